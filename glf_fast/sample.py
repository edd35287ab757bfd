"""python -m glf_fast.sample RUN --n 64 --temperature 0.8 --out grid.png: draw images or sequences from a trained model."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from glf_fast import data, distributed
from glf_fast.command_line import parse, pick_device
from glf_fast.data.attributes import load_attribute
from glf_fast.errors import UserError, run_command
from glf_fast.files import atomic_folder, atomic_write
from glf_fast.images import grid, save_npy, save_png
from glf_fast.models import GenerativeModel, Writes
from glf_fast.training import checkpoint, runs
from glf_fast.training.pictures import check_count, draw, draw_attribute, draw_towards
from glf_fast.training.sequence_scoring import draw_tokens
from glf_fast.training.splits import load_splits


@dataclass(frozen=True)
class Command:
    """Draw images, or token sequences, from a trained model."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    n: int = 64
    """Number of images or sequences."""
    out: Path | None = None
    """Output: a .png (one grid of images), a .npy (uint8, n × C × H × W) or a folder (one PNG per image); by default
    samples.png. For sequences a .txt, by default samples.txt, or a .npy (int64, n × length)."""
    temperature: tuple[float, ...] = (1.0,)
    """Standard deviation of the noise; smaller values give cleaner, less varied images. Several values draw the same noise at
    each of them; in a grid each value has a row."""
    towards: tuple[int, int] | None = None
    """Two labels A B of the data set: instead of samples, a row for each of n test images of label A, whose codes move step by
    step by the difference of the mean codes of labels B and A."""
    attribute: str = ""
    """Name of an attribute in the file --attributes: instead of samples, a row for each of n test images, whose codes move by
    the difference of the mean codes of training images with and without it, from less of it to more."""
    attributes: Path | None = None
    """For --attribute: CelebA's list_attr_celeba.txt, or a CSV with a column of the images' file names, or of their places
    from 0, and a column of 1 and 0 for each attribute."""
    label: tuple[int, ...] = ()
    """Labels of classes to sample from, for a conditional model. Several labels have the same noise; in a grid each has a
    row."""
    mode: str = ""
    """Sampling mode of the model; empty for the usual one. A wrong name lists the modes of the model."""
    seed: int = 0
    """Random seed: image i is the same for the same seed, whatever n is."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of the run to use."""
    data_dir: Path | None = None
    """For --towards and --attribute: folder in which to look for the data set first."""
    device: str = ""
    """Device: cpu, cuda, cuda:1, …; by default cuda if there is a GPU."""


def main() -> None:
    """Run the command."""
    distributed.refuse_several()
    command = parse(Command, sys.argv[1:], "glf_fast.sample")
    if command.out:
        _check_out(command.out)
    check_count(command.n)
    _check_effects(command)
    config = runs.read_config(command.run)  # raises UserError if this is not a run's folder
    model, _ = checkpoint.load_model(
        runs.checkpoint_folder(command.run, runs.pick_checkpoint(command.run, command.checkpoint)),
        pick_device(command.device),
    )
    if isinstance(model, Writes) and not _moves(command):
        _sample_sequences(command, model)
        return
    out = command.out or Path("samples.png")
    if out.suffix == ".txt":
        raise UserError(f"--out {out} is for sequences, and this model draws images; give a .png, a .npy or a folder")
    labels = command.label or (None,)
    _check_numbers(command.n, command.n * len(labels) * len(command.temperature) * math.prod(model.shape), "images")
    if command.towards or command.attribute:
        train, test = (data.as_images(split) for split in load_splits(config.data, command.data_dir))
        if command.towards:
            rows = draw_towards(model, train, test, command.towards, command.n).cpu()
        else:
            assert command.attributes is not None
            has = load_attribute(command.attributes, command.attribute, train)
            rows = draw_attribute(model, train, test, has, command.n).cpu()
    else:
        options: dict[str, Any] = {"seed": command.seed, "mode": command.mode}
        pairs = [(label, t) for label in labels for t in command.temperature]
        rows = torch.stack([draw(model, command.n, label=c, temperature=t, **options).cpu() for c, t in pairs])
    images = rows.flatten(0, 1)
    if out.suffix == ".png":
        save_png(
            out,
            grid(images, rows.shape[1] if len(rows) > 1 or _moves(command) else None),
            scale=max(1, 64 // images.shape[-1]),
        )
    elif out.suffix == ".npy":
        save_npy(out, images)
    else:
        with atomic_folder(out) as folder:  # a part of the images would look like a whole sample
            for i, image in enumerate(images):
                save_png(folder / f"{i:06d}.png", image)
    print(f"wrote {len(images)} images to {out}")


def _sample_sequences(command: Command, model: GenerativeModel) -> None:
    """Print sequences, and write them: as text, one a line, or as tokens."""
    out = command.out or Path("samples.txt")
    if out.suffix not in (".txt", ".npy"):
        raise UserError(f"--out {out} must end in .txt or .npy: this model draws sequences, not images")
    if command.label:
        raise UserError("--label is for images: this model draws sequences, which have no classes; leave --label out")
    count = command.n * len(command.temperature)
    _check_numbers(command.n, count * math.prod(model.shape), "sequences")
    assert isinstance(model, Writes)
    parts = (
        part
        for temperature in command.temperature
        for part in draw_tokens(model, command.n, seed=command.seed, temperature=temperature, mode=command.mode)
    )
    if out.suffix == ".npy":
        first = next(parts)
        tokens = first.new_empty(count, *first.shape[1:])  # at once, so that it fails now where there is no memory
        end = 0
        for part in itertools.chain([first], parts):
            tokens[end : (end := end + len(part))] = part
            print("\n".join(model.text(part)))
        save_npy(out, tokens)
    else:
        with atomic_write(out) as temporary, temporary.open("w", encoding="utf-8") as file:
            for part in parts:  # the text of all may be more than the memory holds
                print(text := "\n".join(model.text(part)))
                file.write(f"{text}\n")
    print(f"wrote {count} sequences to {out}", file=sys.stderr)


def _check_numbers(n: int, numbers: int, what: str) -> None:
    """Raise UserError if so many numbers are more than torch can describe in a tensor."""
    if numbers >= 2**63:
        raise UserError(f"--n {n} {what} are more than any memory holds; draw fewer")


def _check_effects(command: Command) -> None:
    """Raise UserError for an option that would have no effect, and for no temperature at all."""
    if not command.temperature:
        raise UserError("--temperature needs one value or more, such as --temperature 0.7; or leave the option out")
    if command.attribute and command.attributes is None:
        raise UserError("--attribute needs the file that has it, --attributes list_attr_celeba.txt or a CSV")
    moving = _moves(command)
    without = {"data_dir": "without --towards or --attribute"}
    if moving:
        without = dict.fromkeys(("temperature", "mode", "seed", "label"), f"with {moving}")
    if command.towards:
        without |= {"attribute": "with --towards"}
    if not command.attribute:
        without |= {"attributes": "without --attribute"}
    if command.label:
        without |= {"mode": "with --label"}
    for name, why in without.items():
        if getattr(command, name) != getattr(Command, name):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} has no effect {why}; leave {option} out")


def _moves(command: Command) -> str:
    """The option that asks for images whose codes move; "" for samples."""
    return "--towards" if command.towards else "--attribute" if command.attribute else ""


def _check_out(out: Path) -> None:
    """Raise UserError unless `out` is a .png, a .npy, a .txt, or a folder that is new or empty but for hidden files."""
    if out.suffix not in ("", ".png", ".npy", ".txt"):
        raise UserError(
            f"--out {out} must end in .png or .npy, or be a folder (a name without suffix); for sequences, .txt"
        )
    if out.suffix:
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder; remove it or choose another name")
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"the folder --out {out} is not empty, and its images would mix; empty it or choose another")


if __name__ == "__main__":
    run_command(main)
