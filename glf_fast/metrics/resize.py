"""The two ways images reach the size of a feature network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["antialiased", "tf1_bilinear"]


def tf1_bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of float images (B, C, H, W) as TensorFlow 1's `resize_bilinear` did it, which FID is defined by.

    No half-pixel centres, corners not aligned, no antialiasing: output pixel i reads source position i·(in/out), between
    pixel ⌊·⌋ and its right neighbour (the last one repeated). PyTorch's `interpolate` has no such rule.
    """
    top, bottom, y = _neighbours(x.shape[2], height, x)
    left, right, u = _neighbours(x.shape[3], width, x)
    rows = torch.cat([x[:, :, top], x[:, :, bottom]])
    upper, lower = (rows[..., left] + (rows[..., right] - rows[..., left]) * u).chunk(2)
    return upper + (lower - upper) * y[:, None]


def _neighbours(size: int, out: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the lower and upper neighbour of every output position and the weight of the upper one, each (out,)."""
    # In float32, as TensorFlow computes it: the scale's rounding decides which pixel a position near an integer falls on.
    position = torch.arange(out, device=like.device, dtype=torch.float32) * torch.tensor(
        size / out, dtype=torch.float32
    )
    lower = position.floor().long()
    return lower, (lower + 1).clamp(max=size - 1), (position - lower).to(like.dtype)


def antialiased(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of float images with half-pixel centres and antialiasing; the identity when the size is right."""
    if x.shape[2:] == (height, width):
        return x
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=True)
