"""The two ways of resizing images for a feature network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["antialiased", "tf1_bilinear"]


def tf1_bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of float images (B, C, H, W) like TensorFlow 1's `resize_bilinear`, by which FID is defined.

    It has no half-pixel centres, no aligned corners and no antialiasing. Output pixel i reads source position i·(in/out),
    between pixel ⌊·⌋ and its right neighbour (the last pixel is repeated). PyTorch's `interpolate` does not offer this rule.
    """
    top, bottom, y = _neighbours(x.shape[2], height, x)
    left, right, u = _neighbours(x.shape[3], width, x)
    rows = torch.cat([x[:, :, top], x[:, :, bottom]])
    upper, lower = (rows[..., left] + (rows[..., right] - rows[..., left]) * u).chunk(2)
    return upper + (lower - upper) * y[:, None]


def _neighbours(size: int, out: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the lower and upper neighbour of every output position and the weight of the upper one, each (out,)."""
    # TensorFlow computes in float32, and the rounding of the scale decides to which pixel a position near an integer belongs.
    position = torch.arange(out, device=like.device, dtype=torch.float32) * torch.tensor(
        size / out, dtype=torch.float32
    )
    lower = position.floor().long()
    return lower, (lower + 1).clamp(max=size - 1), (position - lower).to(like.dtype)


def antialiased(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of float images with half-pixel centres and antialiasing; images of this size are returned unchanged."""
    if x.shape[2:] == (height, width):
        return x
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=True)
