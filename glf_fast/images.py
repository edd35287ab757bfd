"""Images as tensors: uint8 (N, C, H, W) at rest, float32 in [0, 1] in models; grids and PNG files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glf_fast.files import atomic_write

__all__ = ["grid", "save_npy", "save_png", "to_float", "to_uint8"]


def to_uint8(x: Tensor) -> Tensor:
    """Float images in [0, 1] → uint8, rounded to nearest (truncation would darken every image by half a level)."""
    return (x.float() * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 images → float32 in [0, 1]."""
    return images.float().div_(255)


def grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Tile uint8 images (N, C, H, W) row by row into one picture (C, H', W') on a white ground.

    `columns` defaults to ⌈√N⌉. Raises ValueError for anything but a non-empty uint8 (N, C, H, W) tensor.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(f"grid needs non-empty uint8 (N, C, H, W) images, got {images.dtype} {tuple(images.shape)}")
    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    picture = images.new_full(
        (channels, rows * (height + padding) + padding, columns * (width + padding) + padding), 255
    )
    for i, image in enumerate(images):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        picture[:, top : top + height, left : left + width] = image
    return picture


def save_npy(path: Path | str, images: Tensor) -> None:
    """Write a tensor as .npy, atomically; raises OSError, which names the file and the reason, when the disk is full."""
    array = np.ascontiguousarray(images.cpu().numpy())
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        # Not by numpy.save, whose errors are "256000 requested and 40832 written".
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def save_png(path: Path | str, image: Tensor, scale: int = 1) -> None:
    """Write one uint8 image (C, H, W), C = 1 or 3, as PNG, atomically; `scale` repeats each pixel for small images."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"save_png needs a uint8 (1 or 3, H, W) image, got {image.dtype} {tuple(image.shape)}")
    pixels = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).cpu().numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(temporary, format="PNG")
