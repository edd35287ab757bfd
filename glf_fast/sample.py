"""python -m glf_fast.sample RUN --n 64 --temperature 0.8 --out grid.png: draw images from a trained model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from glf_fast import checkpoint, runs, seeds
from glf_fast.command_line import parse, pick_device
from glf_fast.errors import UserError, run_command
from glf_fast.files import atomic_write
from glf_fast.images import grid, save_png, to_uint8
from glf_fast.models import GenerativeModel

__all__ = ["draw"]

# Noise is drawn for this many images at a time, always: image i is then the same whatever n is. It is also the batch whose
# statistics the authors' protocol normalises by.
_CHUNK = 500


def draw(
    model: GenerativeModel, n: int, *, seed: int, temperature: float = 1.0, authors_protocol: bool = False
) -> Tensor:
    """n images as uint8 (n, C, H, W) on the model's device; image i depends on (seed, i) alone, not on n.

    Pixels that are not finite (a flow that overflows early in training) become black, with a line on stderr.

    Raises:
        UserError: n < 1 or a negative temperature.
    """
    if n < 1:
        raise UserError(f"n = {n} images cannot be drawn; ask for one or more")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature = {temperature} must be 0 or more")
    device = next(model.parameters()).device
    chunks, broken = [], torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, n, _CHUNK):
        x = model.sample(
            _CHUNK,
            temperature=temperature,
            generator=seeds.generator(seed, "sample", start // _CHUNK, device=device),
            authors_protocol=authors_protocol,
        )[: n - start]
        broken += (~x.isfinite().flatten(1).all(1)).sum()
        chunks.append(to_uint8(x.nan_to_num(0.0, 0.0, 0.0)))
    if broken:
        print(f"{int(broken)} of {n} samples are not finite and have black pixels", file=sys.stderr)
    return torch.cat(chunks)


@dataclass(frozen=True)
class Command:
    """Draw images from a trained model."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    n: int = 64
    """How many."""
    out: Path = Path("samples.png")
    """A .png (one grid), a .npy (uint8, n × C × H × W) or a folder (one PNG each)."""
    temperature: float = 1.0
    """Standard deviation of the noise; less gives cleaner, more alike images."""
    authors_protocol: bool = False
    """As the GLF authors' code samples: batch statistics, and every image stretched to the full range."""
    seed: int = 0
    """Image i is the same for the same seed, whatever n is."""
    checkpoint: Literal["best", "last"] = "best"
    """Which of the run's checkpoints."""
    device: str = ""
    """cpu, cuda, …; by default cuda where there is one."""


def main() -> None:
    """The command."""
    command = parse(Command, sys.argv[1:], "glf_fast.sample")
    runs.read_config(command.run)  # says so if this is no run's folder
    model, _ = checkpoint.load_model(
        runs.checkpoint_folder(command.run, runs.pick_checkpoint(command.run, command.checkpoint)),
        pick_device(command.device),
    )
    images = draw(
        model,
        command.n,
        seed=command.seed,
        temperature=command.temperature,
        authors_protocol=command.authors_protocol,
    ).cpu()
    if command.out.suffix == ".png":
        save_png(command.out, grid(images), scale=max(1, 64 // images.shape[-1]))
    elif command.out.suffix == ".npy":
        with atomic_write(command.out) as temporary:
            np.save(temporary, images.numpy())
    elif command.out.suffix:
        raise UserError(f"--out {command.out} must end in .png or .npy, or be a folder (no suffix)")
    else:
        for i, image in enumerate(images):
            save_png(command.out / f"{i:06d}.png", image)
    print(f"{command.n} images in {command.out}")


if __name__ == "__main__":
    run_command(main)
