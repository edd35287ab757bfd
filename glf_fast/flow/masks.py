"""How a coupling divides its input into what it is conditioned on, p, and what it transforms, v."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

__all__ = ["ChannelMask", "Checkerboard"]


class ChannelMask:
    """p and v are channels; the network is given p, and what it returns belongs to v.

    Channels that lie together are split off and put back in one piece, so that a mask of two halves costs one split and one
    `cat`. The gradient of a split is one copy; that of two slices is two buffers of zeros, two copies and a sum.

    Args:
        transformed: for each channel whether it is one of v.
    """

    def __init__(self, transformed: Sequence[bool]) -> None:
        runs = [(is_v, len(list(run))) for is_v, run in groupby(transformed)]
        self.v_first = runs[0][0]
        self.runs = [n for _, n in runs]
        self.p_runs, self.v_runs = ([n for is_v, n in runs if is_v == wanted] for wanted in (False, True))
        self.outputs = sum(self.v_runs)

    def divide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D, …) → p (B, D − T, …), v (B, T, …)."""
        pieces = x.split(self.runs, 1)
        p, v = pieces[self.v_first :: 2], pieces[not self.v_first :: 2]
        return (p[0], v[0]) if len(pieces) == 2 else (torch.cat(p, 1), torch.cat(v, 1))

    def of_v(self, output: Tensor) -> Tensor:
        """The part of a network's u or t that belongs to v: all."""
        return output

    def join(self, p: Tensor, w: Tensor) -> Tensor:
        """p (B, D − T, …) and w (B, T, …) in their places (B, D, …)."""
        if len(self.runs) == 2:
            return torch.cat((w, p) if self.v_first else (p, w), 1)
        p_pieces, w_pieces = iter(p.split(self.p_runs, 1)), iter(w.split(self.v_runs, 1))
        # What comes next is of v at every second place.
        return torch.cat([next(w_pieces if i % 2 != self.v_first else p_pieces) for i in range(len(self.runs))], 1)


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
