"""Couplings of images with Glow's network on a processor (csrc/cpu/glow_network.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glf_fast.ops.backends import CPP
from glf_fast.ops.checks import check_fake
from glf_fast.ops.codes import LOG_SCALE_CODES
from glf_fast.ops.glow_coupling.call import Call, GlowOptions
from glf_fast.ops.glow_network.cpp import MOST_HIDDEN, contiguous, pixels_of

__all__ = ["BACKENDS", "backward", "forward", "refuses"]

BACKENDS = (CPP,)
operations = torch.ops.glf_fast


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call, or ""."""
    if call.options.affine.log_scale not in LOG_SCALE_CODES:
        return f"csrc has no log-scale {call.options.affine.log_scale!r}"
    return "" if call.parameters[0].shape[0] <= MOST_HIDDEN else f"more than {MOST_HIDDEN} hidden channels"


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, H, W, D), logdet (B,), and what the network made (B, H, W, 2·T)."""
    return operations.cpu_glow_coupling.default(pixels_of(call.x), contiguous(call.parameters), *_numbers(call.options))


def backward(call: Call, made: Tensor, grad_y: Tensor, grad_logdet: Tensor) -> Sequence[Tensor]:
    """The gradients of x and of the parameters, from those of y (B, H, W, D) and of logdet."""
    of_x, *rest = operations.cpu_glow_coupling_backward.default(
        grad_y.contiguous(), grad_logdet.contiguous(), pixels_of(call.x), made, contiguous(call.parameters),
        *_numbers(call.options),
    )  # fmt: skip
    return of_x.movedim(-1, 1), *rest


def _numbers(options: GlowOptions) -> tuple[Any, ...]:
    """gain_factor, v_first, log_scale, constant, add_first, inverse, as the kernels take them."""
    affine = options.affine
    code = LOG_SCALE_CODES[affine.log_scale]
    return options.gain_factor, options.v_first, code, affine.constant, affine.add_first, affine.inverse


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------

if not CPP.missing:

    @torch.library.register_fake("glf_fast::cpu_glow_coupling")
    def _(
        x: Tensor, parameters: list[Tensor], gain_factor: float, v_first: bool, log_scale: int, constant: float,
        add_first: bool, inverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        check_fake(x)
        return x.new_empty(x.shape), x.new_empty(x.shape[0]), x.new_empty(*x.shape[:3], parameters[6].shape[0])

    @torch.library.register_fake("glf_fast::cpu_glow_coupling_backward")
    def _(
        grad_y: Tensor, grad_logdet: Tensor, x: Tensor, raw: Tensor, parameters: list[Tensor], gain_factor: float,
        v_first: bool, log_scale: int, constant: float, add_first: bool, inverse: bool,
    ) -> list[Tensor]:  # fmt: skip
        check_fake(x)
        return [torch.empty_like(tensor) for tensor in (x, *parameters)]
