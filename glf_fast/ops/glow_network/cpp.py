"""Glow's networks on a processor (csrc/cpu/glow_network.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.backends import CPP
from glf_fast.ops.checks import check_fake
from glf_fast.ops.glow_network.call import Call

__all__ = ["BACKENDS", "backward", "forward", "refuses"]

BACKENDS = (CPP,)
operations = torch.ops.glf_fast
# From here on the weights, not the hidden layers, fill the cache, and torch's convolutions are as fast.
_MOST_HIDDEN = 256


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call, or ""."""
    return "" if call.first.shape[0] <= _MOST_HIDDEN else f"more than {_MOST_HIDDEN} hidden channels"


def forward(call: Call) -> Tensor:
    """The output (B, O, H, W), with the channels last in memory."""
    return operations.cpu_glow_network.default(_pixels(call.x), *_matrices(call)).movedim(-1, 1)


def backward(call: Call, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of all arguments."""
    of_x, first, first_bias, second, second_bias, last = operations.cpu_glow_network_backward.default(
        _pixels(grad), _pixels(call.x), *_matrices(call)
    )
    hidden, channels = call.first.shape[:2]
    return (
        of_x.movedim(-1, 1),
        first.view(3, 3, channels, hidden).permute(3, 2, 0, 1),
        first_bias,
        second.mT[..., None, None],
        second_bias,
        last.view(hidden, 3, 3, -1).permute(3, 0, 1, 2),
        grad.sum(0),
    )


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H, W, C), contiguous."""
    return x.movedim(1, -1).contiguous()


def _matrices(call: Call) -> tuple[Tensor, ...]:
    """(9·C, N), (N,), (N, N), (N,), (N, 9·O), (H, W, O): see csrc/cpu/flow.h."""
    hidden = call.first.shape[0]
    return (
        call.first.permute(2, 3, 1, 0).reshape(-1, hidden),
        call.first_bias.contiguous(),
        call.second[..., 0, 0].mT.contiguous(),
        call.second_bias.contiguous(),
        call.last.permute(1, 2, 3, 0).reshape(hidden, -1),
        call.offset.movedim(0, -1).contiguous(),
    )


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------

if not CPP.missing:

    @torch.library.register_fake("glf_fast::cpu_glow_network")
    def _(
        x: Tensor,
        first: Tensor,
        first_bias: Tensor,
        second: Tensor,
        second_bias: Tensor,
        last: Tensor,
        offset: Tensor,
    ) -> Tensor:
        check_fake(x)
        return x.new_empty(*x.shape[:3], offset.shape[2])

    @torch.library.register_fake("glf_fast::cpu_glow_network_backward")
    def _(
        grad_out: Tensor,
        x: Tensor,
        first: Tensor,
        first_bias: Tensor,
        second: Tensor,
        second_bias: Tensor,
        last: Tensor,
        offset: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return tuple(torch.empty_like(t) for t in (x, first, first_bias, second, second_bias, last))  # type: ignore[return-value]
