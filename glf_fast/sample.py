"""python -m glf_fast.sample RUN --n 64 --temperature 0.8 --out grid.png: draw images from a trained model."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from glf_fast.command_line import parse, pick_device
from glf_fast.errors import UserError, run_command
from glf_fast.files import atomic_folder
from glf_fast.images import grid, save_npy, save_png
from glf_fast.training import checkpoint, runs
from glf_fast.training.pictures import draw


@dataclass(frozen=True)
class Command:
    """Draw images from a trained model."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    n: int = 64
    """Number of images."""
    out: Path = Path("samples.png")
    """Output: a .png (one grid of images), a .npy (uint8, n × C × H × W) or a folder (one PNG per image)."""
    temperature: float = 1.0
    """Standard deviation of the noise; smaller values give cleaner, less varied images."""
    mode: str = ""
    """Sampling mode of the model; empty for the usual one. A wrong name lists the modes of the model."""
    seed: int = 0
    """Random seed: image i is the same for the same seed, whatever n is."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of the run to use."""
    device: str = ""
    """Device: cpu, cuda, cuda:1, …; by default cuda if there is a GPU."""


def main() -> None:
    """Run the command."""
    command = parse(Command, sys.argv[1:], "glf_fast.sample")
    _check_out(command.out)
    runs.read_config(command.run)  # raises UserError if this is not a run's folder
    model, _ = checkpoint.load_model(
        runs.checkpoint_folder(command.run, runs.pick_checkpoint(command.run, command.checkpoint)),
        pick_device(command.device),
    )
    if command.n * math.prod(model.shape) >= 2**63:  # the largest tensor that torch can describe
        raise UserError(f"--n {command.n} images are more than any memory holds; draw fewer")
    images = draw(model, command.n, seed=command.seed, temperature=command.temperature, mode=command.mode).cpu()
    if command.out.suffix == ".png":
        save_png(command.out, grid(images), scale=max(1, 64 // images.shape[-1]))
    elif command.out.suffix == ".npy":
        save_npy(command.out, images)
    else:
        with atomic_folder(command.out) as folder:  # a part of the images would look like a whole sample
            for i, image in enumerate(images):
                save_png(folder / f"{i:06d}.png", image)
    print(f"wrote {command.n} images to {command.out}")


def _check_out(out: Path) -> None:
    """Raise UserError unless `out` is a .png, a .npy, or a folder that is new or empty but for hidden files."""
    if out.suffix not in ("", ".png", ".npy"):
        raise UserError(f"--out {out} must end in .png or .npy, or be a folder (a name without suffix)")
    if out.suffix:
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder; remove it or choose another name")
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"the folder --out {out} is not empty, and its images would mix; empty it or choose another")


if __name__ == "__main__":
    run_command(main)
