"""python -m glf_fast.sample RUN --n 64 --temperature 0.8 --out grid.png: draw images from a trained model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from glf_fast.command_line import parse, pick_device
from glf_fast.errors import UserError, run_command
from glf_fast.files import atomic_write
from glf_fast.images import grid, save_png
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
    if not command.out.suffix and command.out.is_dir() and any(command.out.iterdir()):
        raise UserError(
            f"the folder --out {command.out} is not empty, and its images would mix; empty it or choose another"
        )
    runs.read_config(command.run)  # raises UserError if this is not a run's folder
    model, _ = checkpoint.load_model(
        runs.checkpoint_folder(command.run, runs.pick_checkpoint(command.run, command.checkpoint)),
        pick_device(command.device),
    )
    images = draw(model, command.n, seed=command.seed, temperature=command.temperature, mode=command.mode).cpu()
    if command.out.suffix == ".png":
        save_png(command.out, grid(images), scale=max(1, 64 // images.shape[-1]))
    elif command.out.suffix == ".npy":
        with atomic_write(command.out) as temporary:
            np.save(temporary, images.numpy())
    elif command.out.suffix:
        raise UserError(f"--out {command.out} must end in .png or .npy, or be a folder (a name without suffix)")
    else:
        for i, image in enumerate(images):
            save_png(command.out / f"{i:06d}.png", image)
    print(f"wrote {command.n} images to {command.out}")


if __name__ == "__main__":
    run_command(main)
