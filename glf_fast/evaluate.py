"""python -m glf_fast.evaluate RUN: Fréchet distances and KID of a trained model, with their protocol."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from torch import Tensor

from glf_fast import checkpoint, data, metrics, report, runs
from glf_fast.command_line import parse, pick_device
from glf_fast.errors import UserError, run_command
from glf_fast.images import to_float, to_uint8
from glf_fast.metrics import Extractor
from glf_fast.models import GenerativeModel
from glf_fast.sample import draw

__all__ = ["evaluate", "load_extractors", "reconstructions", "table"]


def evaluate(
    model: GenerativeModel,
    train: data.ImageDataset,
    test: data.ImageDataset,
    extractors: Sequence[Extractor],
    *,
    n: int,
    seed: int = 0,
    temperature: float = 1.0,
    authors_protocol: bool = False,
    about: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Score n samples, and the reconstructions of up to n test images, against the test images, with each extractor.

    Args:
        about: which checkpoint this is; only recorded.

    Returns:
        Per extractor {"settings": …, "checkpoint": about, "samples": score, "reconstructions": score}, JSON-ready; a score
        is `metrics.score`'s.

    Raises:
        UserError: fewer than two samples or images.
    """
    sampling = {"temperature": temperature, "authors_protocol": authors_protocol}
    samples = draw(model, n, seed=seed, temperature=temperature, authors_protocol=authors_protocol)
    results = []
    for extractor in extractors:
        reference = metrics.reference(train, test, extractor, n=n)
        shared = {"checkpoint": about or {}}
        results.append(
            {
                "settings": {"extractor": extractor.name, "n": n, "seed": seed, **sampling},
                **shared,
                "samples": metrics.score(samples, reference, extractor, seed=seed, sampling=sampling | shared),
                "reconstructions": metrics.score(
                    reconstructions(model, test.images, n),
                    reference,
                    extractor,
                    sampling={"images": "test", **shared},
                ),
            }
        )
    return results


def reconstructions(model: GenerativeModel, test_images: Tensor, n: int) -> Iterator[Tensor]:
    """Batches of uint8 reconstructions of the n uint8 test images that `metrics.reference` takes, too.

    In random order, but another than there: KID compares block with block, and unbiased only if they share no images.
    """
    device, images = next(model.parameters()).device, metrics.subset(test_images, n)
    for batch in images.roll(len(images) // 2, 0).split(500):
        yield to_uint8(model.reconstruct(to_float(batch.to(device))))


def load_extractors(names: Sequence[str], device: Any, *, all_needed: bool = False) -> list[Extractor]:
    """The extractors by name; those whose weights cannot be had are left out with a line on stderr, "tiny" if none is left.

    Raises:
        UserError: a name that does not exist; with `all_needed` also weights that cannot be had.
    """
    loaded = []
    for name in names:
        try:
            loaded.append(metrics.extractor(name, device=device))
        except (UserError, OSError) as error:
            if all_needed or name not in metrics.names():
                raise
            print(f"no scores with {name}: {error}", file=sys.stderr)
    return loaded or [metrics.extractor("tiny", device=device)]


def table(scores: Sequence[dict[str, Any]]) -> str:
    """Scores for people: a line each, then what real images get."""
    head = ("", "samples", "95 %", "KID", "reconstructions", "train/test", "train/train", "images")
    rows = [head]
    for score in scores:
        samples, floors = score["samples"], score["samples"]["floors"]
        interval, kid = samples["interval"], samples["kid"]
        name = samples["metric"] + (" (authors' protocol)" if score["settings"]["authors_protocol"] else "")
        rows.append(
            (
                name,
                f"{samples['value']:.2f}",
                f"{interval[0]:.2f} … {interval[1]:.2f}" if interval else "",
                f"{kid['mean']:.4f}" if kid else "",
                f"{score['reconstructions']['value']:.2f}",
                *(f"{floors[key]:.2f}" for key in head[5:7]),
                str(score["settings"]["n"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


@dataclass(frozen=True)
class Command:
    """Score a trained model against the test images of its data set."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    checkpoint: Literal["best", "last"] = "best"
    """Which of the run's checkpoints."""
    extractor: tuple[str, ...] = ()
    """Feature networks; by default the run's."""
    n: int | None = None
    """Samples; by default the run's number."""
    temperature: float = 1.0
    """Standard deviation of the noise."""
    seed: int = 0
    """Of the samples."""
    authors_protocol: tyro.conf.FlagCreatePairsOff[bool] = False
    """Sample as the model's authors did, where that moves the score (GLF: batch statistics, images stretched to [0, 1])."""
    data_dir: Path | None = None
    """Folder to look for the data set in first."""
    device: str = ""
    """cpu, cuda, …; by default cuda where there is one."""


def main() -> None:
    """The command."""
    command = parse(Command, sys.argv[1:], "glf_fast.evaluate")
    config, device = runs.read_config(command.run), pick_device(command.device)
    which = runs.pick_checkpoint(command.run, command.checkpoint)
    model, state = checkpoint.load_model(runs.checkpoint_folder(command.run, which), device)
    train, test = (
        data.as_images(
            data.load(config.data.source, split, data_dir=command.data_dir, image_size=config.data.image_size)
        )
        for split in data.SPLITS
    )
    scores = evaluate(
        model,
        train,
        test,
        load_extractors(command.extractor or config.score.extractors, device, all_needed=bool(command.extractor)),
        n=config.score.samples if command.n is None else command.n,
        seed=command.seed,
        temperature=command.temperature,
        authors_protocol=command.authors_protocol,
        about={"name": which, "images": state["images"], "epoch": state["epoch"], "ema": config.ema},
    )
    runs.write_scores(command.run, scores)
    report.write(command.run)
    print(table(scores))
    print(f"\nin {command.run / 'scores.json'} with their protocol, and in {command.run / 'report.html'}")


if __name__ == "__main__":
    run_command(main)
