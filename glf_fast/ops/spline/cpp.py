"""Splines on a processor (csrc/cpu/spline.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.backends import CPP
from glf_fast.ops.checks import check_fake
from glf_fast.ops.spline.call import Call

__all__ = ["BACKENDS", "backward", "forward", "refuses"]

BACKENDS = (CPP,)
operations = torch.ops.glf_fast


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call: never."""
    return ""


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y like x, and the sums of log-derivatives (rows,)."""
    return operations.cpu_spline.default(call.x, call.parameters, call.options.prepared().numbers(), call.inverse)


def backward(call: Call, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Tensor, Tensor]:
    """∂x and ∂parameters."""
    return operations.cpu_spline_backward.default(
        grad_y, grad_logdet, call.x, call.parameters, call.options.prepared().numbers(), call.inverse
    )


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------

if not CPP.missing:

    @torch.library.register_fake("glf_fast::cpu_spline")
    def _(x: Tensor, parameters: Tensor, options: list[float], inverse: bool) -> tuple[Tensor, Tensor]:
        check_fake(x)
        return torch.empty_like(x), x.new_empty(x.shape[0])

    @torch.library.register_fake("glf_fast::cpu_spline_backward")
    def _(
        grad_y: Tensor, grad_logdet: Tensor, x: Tensor, parameters: Tensor, options: list[float], inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(parameters)
