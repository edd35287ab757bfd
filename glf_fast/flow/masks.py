"""How a coupling divides its input into what it is conditioned on, p, and what it transforms, v."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ChannelHalves", "Checkerboard"]


class ChannelHalves:
    """p and v are the first and the last channels, or the other way round; a network's u and t belong to v.

    The gradient of a split is one copy; that of two slices is two buffers of zeros, two copies and a sum.

    Args:
        first, last: channels of the two.
        v_first: v is the first.
    """

    def __init__(self, first: int, last: int, *, v_first: bool) -> None:
        self.sizes = (first, last)
        self.v_first = v_first
        self.outputs = first if v_first else last

    def divide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D, …) → p (B, D − T, …), v (B, T, …)."""
        first, last = x.split(self.sizes, 1)
        return (last, first) if self.v_first else (first, last)

    def of_v(self, output: Tensor) -> Tensor:
        """The part of a network's u or t that belongs to v: all."""
        return output

    def join(self, p: Tensor, w: Tensor) -> Tensor:
        """p (B, D − T, …) and w (B, T, …) in their places (B, D, …)."""
        return torch.cat((w, p) if self.v_first else (p, w), 1)


class Checkerboard:
    """p and v are the pixels of the two colours of a checkerboard: RealNVP (arXiv:1605.08803), section 3.4.

    The network is given all channels of x, with zeros in the places of v, and what it returns counts in those places alone.
    p is that image, v (B, D, n) holds the n pixels.

    Args:
        x: the image (B, D, H, W).
        even: v has the colour of pixel (0, 0), not that of (0, 1).
    """

    def __init__(self, x: Tensor, *, even: bool) -> None:
        if x.ndim != 4:
            raise ValueError(f"a checkerboard needs images (batch, dim, height, width); got shape {tuple(x.shape)}")
        self.outputs = x.shape[1]
        height, width = x.shape[2:]
        if width % 2:  # every second pixel in the order of memory
            self.places = torch.arange(0 if even else 1, height * width, 2, device=x.device)
        else:
            count = torch.arange(height * width // 2, device=x.device)
            self.places = 2 * count + (count // (width // 2) + (not even)) % 2

    def divide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D, H, W) → p (B, D, H, W), v (B, D, n)."""
        return x.flatten(2).index_fill(2, self.places, 0).view(x.shape), self.of_v(x)

    def of_v(self, output: Tensor) -> Tensor:
        """The pixels (B, D, n) of a network's u or t (B, D, H, W) that belong to v."""
        return output.flatten(2).index_select(2, self.places)

    def join(self, p: Tensor, w: Tensor) -> Tensor:
        """p (B, D, H, W) with w (B, D, n) in the places of its zeros."""
        return p.flatten(2).index_copy(2, self.places, w).view(p.shape)
