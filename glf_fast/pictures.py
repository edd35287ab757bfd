"""What one looks at while a model trains: samples on fixed noise, reconstructions, interpolations."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from glf_fast.images import grid, save_png, to_float, to_uint8
from glf_fast.metrics import subset
from glf_fast.models import GenerativeModel
from glf_fast.sample import draw

__all__ = ["KINDS", "draw_pictures", "latest_picture", "picture_name", "save_picture"]

KINDS = ("samples", "reconstructions", "interpolations")


def draw_pictures(model: GenerativeModel, test_images: Tensor, seed: int) -> dict[str, Tensor]:
    """A uint8 picture (C, H, W) of each kind; the same noise and the same few test images (N, C, H, W) every time.

    The few come in a fixed random order, as data sets may be sorted by class. Reconstructions are pairs of rows: real images,
    below them what the model makes of them. Interpolations run from one test image to another.
    """
    real = subset(test_images, min(32, len(test_images) // 2 * 2))
    half = len(real) // 2
    rebuilt = to_uint8(model.reconstruct(to_float(real)))
    pairs = torch.cat([real[:half], rebuilt[:half], real[half:], rebuilt[half:]])
    ends = to_float(real[:10])
    ways = to_uint8(model.interpolate(ends[0::2], ends[1::2], 12).nan_to_num())
    pictures = {
        "samples": grid(draw(model, 64, seed=seed)),
        "reconstructions": grid(pairs, columns=half),
        "interpolations": grid(ways.flatten(0, 1), columns=12),
    }
    return {kind: picture.cpu() for kind, picture in pictures.items()}


def picture_name(images: int) -> str:
    """File name of the pictures made after so many training images."""
    return f"{images:09d}.png"


def save_picture(run: Path, kind: str, picture: Tensor, images: int) -> None:
    """Write run/{kind}/{images seen}.png, enlarged if it is small."""
    save_png(run / kind / picture_name(images), picture, scale=math.ceil(480 / picture.shape[-1]))


def latest_picture(run: Path, kind: str) -> Path | None:
    """The newest picture of a kind, None if there is none yet."""
    return max((run / kind).glob("*.png"), default=None)
