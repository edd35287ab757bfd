"""ColorMNIST: the digits of MNIST in ten colours, so that every image belongs to one of a hundred modes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glf_fast.data.dataset import ImageDataset
from glf_fast.data.idx import MNIST, read_idx
from glf_fast.data.source import Files

__all__ = ["COLOR_MNIST", "PALETTE", "color_of"]

# Colours of full saturation, in red, green and blue, and white.
PALETTE = {
    "red": (255, 0, 0),
    "orange": (255, 128, 0),
    "yellow": (255, 255, 0),
    "lime": (128, 255, 0),
    "green": (0, 255, 0),
    "cyan": (0, 255, 255),
    "azure": (0, 128, 255),
    "blue": (0, 0, 255),
    "magenta": (255, 0, 255),
    "white": (255, 255, 255),
}
POLICY = (
    "MNIST; each digit in one of ten colours on black, equally many of each colour in a fixed random order; "
    "label: 10 times the colour, plus the digit"
)


def read_color_mnist(files: Files, split: str, image_size: int | None) -> ImageDataset:
    """uint8 (N, 3, 28, 28), labels 10·colour + digit. The colour of image i depends on i and on the split's size alone."""
    grey = read_idx(files, split, image_size)
    assert grey.labels is not None
    count = len(grey)
    seed = 0 if split == "train" else 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    colors = torch.empty(count, dtype=torch.int64)
    colors[order] = torch.arange(count) % len(PALETTE)
    images = _colored(grey.images, colors)
    return ImageDataset.of(files.source.name, split, images, 10 * colors + grey.labels, POLICY)


def color_of(images: Tensor) -> Tensor:
    """The nearest colour of each image, as an index (N,) into `PALETTE`, for images (N, 3, H, W), uint8 or in [0, 1].

    The colour of an image is its mean over the pixels, divided by the brightest channel.
    """
    mean = images.to(torch.float64).mean((2, 3))
    hue = mean / mean.amax(1, keepdim=True).clamp(min=1e-12)
    return torch.cdist(hue, _palette().to(hue) / 255).argmin(1)


def _colored(grey: Tensor, colors: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) of grey images (N, 1, H, W), whose grey levels scale the colours (N,)."""
    tint = _palette()[colors].view(-1, 3, 1, 1)
    return torch.cat(
        [part.int() * hue // 255 for part, hue in zip(grey.split(4096), tint.split(4096), strict=True)]
    ).to(torch.uint8)


def _palette() -> Tensor:
    return torch.tensor(list(PALETTE.values()), dtype=torch.int32)


COLOR_MNIST = replace(
    MNIST,
    name="color-mnist",
    title="ColorMNIST: handwritten digits in ten classes and ten colours",
    citation=(
        f"{MNIST.citation}; coloured digits as in Rosca et al., arXiv:1706.04987, with a palette of glf_fast's own"
    ),
    shape=(3, 28, 28),
    read=read_color_mnist,
    folder=MNIST.name,
)
