"""Affine maps of the channels of images that lie together in memory, on a processor (csrc/cpu/channel_map.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.backends import CPP
from glf_fast.ops.checks import check_fake
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted

__all__ = ["BACKENDS", "channel_map", "refuses"]

BACKENDS = (CPP,)
operations = torch.ops.glf_fast


_MOST_CHANNELS = 256  # beyond, a tile's part of the matrix leaves the caches, and a library's product is the faster one


def refuses(x: Tensor) -> str:
    """Why the kernels cannot take these images; "" where they can."""
    return "" if x.shape[1] <= _MOST_CHANNELS else f"more than {_MOST_CHANNELS} channels"


def channel_map(x: Tensor, matrix: Tensor, offset: Tensor, inverse: bool) -> Tensor:
    """The y of `reference.invertible_linear` for images (B, C, …), with the channels last in memory."""
    graded = torch.is_grad_enabled() and (x.requires_grad or matrix.requires_grad or offset.requires_grad)
    rows = (_ChannelMap.apply if graded else _forward)(x, matrix, offset, inverse)
    return _images(rows, x)  # not in the function, whose outputs may be changed in place only if they are no views


def _forward(x: Tensor, matrix: Tensor, offset: Tensor, inverse: bool) -> Tensor:
    """y as rows of channels."""
    return operations.cpu_channel_map.default(_rows(x), matrix.contiguous(), offset.contiguous(), inverse)


class _ChannelMap(torch.autograd.Function):
    """The rows of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, offset: Tensor, inverse: bool) -> Tensor:
        ctx.inverse = inverse
        ctx.save_for_backward(x, matrix, offset)
        return _forward(x, matrix, offset, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x, matrix, offset), inverse = ctx.saved_tensors, ctx.inverse
        if plain_gradients_wanted((grad,)):

            def plain(x: Tensor, matrix: Tensor, offset: Tensor) -> tuple[Tensor]:
                y = reference.invertible_linear(x, matrix, offset, matrix.new_zeros(()), inverse=inverse)[0]
                return (y.movedim(1, -1).reshape(-1, y.shape[1]),)

            return *differentiate(plain, (x, matrix, offset), ctx.needs_input_grad[:3], (grad,)), None
        of_x, of_matrix, of_offset = operations.cpu_channel_map_backward.default(
            grad.contiguous(), _rows(x), matrix.contiguous(), offset.contiguous(), inverse
        )
        return _images(of_x, x), of_matrix, of_offset, None


def _rows(x: Tensor) -> Tensor:
    """(B, C, …) → (B · pixels, C), contiguous."""
    return x.movedim(1, -1).reshape(-1, x.shape[1]).contiguous()


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    return rows.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------

if not CPP.missing:

    @torch.library.register_fake("glf_fast::cpu_channel_map")
    def _(x: Tensor, A: Tensor, c: Tensor, inverse: bool) -> Tensor:
        check_fake(x)
        return torch.empty_like(x)

    @torch.library.register_fake("glf_fast::cpu_channel_map_backward")
    def _(grad_y: Tensor, x: Tensor, A: Tensor, c: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        check_fake(x)
        return torch.empty_like(x), torch.empty_like(A), torch.empty_like(c)
