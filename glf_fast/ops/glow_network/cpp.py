"""Glow's networks on a processor (csrc/cpu/glow_network.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glf_fast.ops.backends import CPP
from glf_fast.ops.checks import check_fake
from glf_fast.ops.glow_network.call import Call

__all__ = ["BACKENDS", "MOST_HIDDEN", "backward", "contiguous", "forward", "pixels_of", "refuses"]

BACKENDS = (CPP,)
operations = torch.ops.glf_fast
# With more channels the weights fill the cache, not the hidden layers, and torch's convolutions take less time.
MOST_HIDDEN = 256


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call, or ""."""
    return "" if call.first.shape[0] <= MOST_HIDDEN else f"more than {MOST_HIDDEN} hidden channels"


def forward(call: Call) -> Tensor:
    """The output (B, O, H, W), with the channels last in memory."""
    x, *parameters, gain_factor = call
    return operations.cpu_glow_network.default(pixels_of(x), contiguous(parameters), gain_factor).movedim(-1, 1)


def backward(call: Call, grad: Tensor) -> Sequence[Tensor]:
    """The gradients of all tensors."""
    x, *parameters, gain_factor = call
    of_x, *rest = operations.cpu_glow_network_backward.default(
        pixels_of(grad), pixels_of(x), contiguous(parameters), gain_factor
    )
    return of_x.movedim(-1, 1), *rest


def pixels_of(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H, W, C), contiguous."""
    return x.movedim(1, -1).contiguous()


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, each in one piece."""
    return [tensor.contiguous() for tensor in tensors]


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------

if not CPP.missing:

    @torch.library.register_fake("glf_fast::cpu_glow_network")
    def _(x: Tensor, parameters: list[Tensor], gain_factor: float) -> Tensor:
        check_fake(x)
        return x.new_empty(*x.shape[:3], parameters[6].shape[0])

    @torch.library.register_fake("glf_fast::cpu_glow_network_backward")
    def _(grad_out: Tensor, x: Tensor, parameters: list[Tensor], gain_factor: float) -> list[Tensor]:
        check_fake(x)
        return [torch.empty_like(tensor) for tensor in (x, *parameters)]
