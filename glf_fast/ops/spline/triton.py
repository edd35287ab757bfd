"""Splines on a GPU (kernels/spline.py). Triton is imported when the first kernel runs.

One launch each way; two for the forward of rows with many columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.backends import TRITON
from glf_fast.ops.checks import check_fake
from glf_fast.ops.spline.call import Call

__all__ = ["BACKENDS", "backward", "forward", "refuses"]

BACKENDS = (TRITON,)
FORMULA = "float[] options, bool inverse"  # the numbers of a PreparedSpline
torch.library.define("glf_fast::triton_spline", f"(Tensor x, Tensor parameters, {FORMULA}) -> (Tensor, Tensor)")
torch.library.define(
    "glf_fast::triton_spline_backward",
    f"(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor parameters, {FORMULA}) -> (Tensor, Tensor)",
)
operations = torch.ops.glf_fast


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call: never."""
    return ""


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y like x, and the sums of log-derivatives (rows,)."""
    return operations.triton_spline.default(call.x, call.parameters, call.options.prepared().numbers(), call.inverse)


def backward(call: Call, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Tensor, Tensor]:
    """∂x and ∂parameters."""
    return operations.triton_spline_backward.default(
        grad_y, grad_logdet, call.x, call.parameters, call.options.prepared().numbers(), call.inverse
    )


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------


@torch.library.register_fake("glf_fast::triton_spline")
def _(x: Tensor, parameters: Tensor, options: list[float], inverse: bool) -> tuple[Tensor, Tensor]:
    check_fake(x)
    return torch.empty_like(x), x.new_empty(x.shape[0])


@torch.library.register_fake("glf_fast::triton_spline_backward")
def _(
    grad_y: Tensor, grad_logdet: Tensor, x: Tensor, parameters: Tensor, options: list[float], inverse: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(parameters)


@torch.library.impl("glf_fast::triton_spline", ("cpu", "cuda"))
def _(x: Tensor, parameters: Tensor, options: list[float], inverse: bool) -> tuple[Tensor, Tensor]:
    from glf_fast.kernels.spline import splines_forward

    return splines_forward(x, parameters, options, inverse)


@torch.library.impl("glf_fast::triton_spline_backward", ("cpu", "cuda"))
def _(
    grad_y: Tensor, grad_logdet: Tensor, x: Tensor, parameters: Tensor, options: list[float], inverse: bool
) -> tuple[Tensor, Tensor]:
    from glf_fast.kernels.spline import splines_backward

    return splines_backward(grad_y, grad_logdet, x, parameters, options, inverse)
