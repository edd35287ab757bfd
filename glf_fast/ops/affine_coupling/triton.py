"""The elementwise affine coupling on a GPU (kernels/affine_coupling.py). Triton is imported when the first kernel runs.

One launch each way; two for the forward of few large samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.affine_coupling.call import AffineOptions, Call
from glf_fast.ops.backends import TRITON
from glf_fast.ops.checks import check_fake

__all__ = ["BACKENDS", "backward", "forward", "refuses"]

BACKENDS = (TRITON,)
FORMULA = "str log_scale, float constant, bool add_first, bool inverse"
torch.library.define(
    "glf_fast::triton_affine_coupling", f"(Tensor v, Tensor u, Tensor t, {FORMULA}) -> (Tensor, Tensor)"
)
torch.library.define(
    "glf_fast::triton_affine_coupling_backward",
    f"(Tensor grad_w, Tensor grad_logdet, Tensor v, Tensor u, Tensor t, {FORMULA}) -> (Tensor, Tensor, Tensor)",
)
operations = torch.ops.glf_fast


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call: never."""
    return ""


def _formula(options: AffineOptions) -> tuple[str, float, bool, bool]:
    """FORMULA of the operations."""
    return options.log_scale, options.constant, options.add_first, options.inverse


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """w, in v's order of memory, and logdet (B,)."""
    return operations.triton_affine_coupling.default(call.v, call.u, call.t, *_formula(call.options))


def backward(call: Call, grad_w: Tensor, grad_logdet: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∂v, ∂u, ∂t, each in the precision of its operand."""
    return operations.triton_affine_coupling_backward.default(
        grad_w, grad_logdet, call.v, call.u, call.t, *_formula(call.options)
    )


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------


def _like(v: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor in v's order of memory, as kernels.affine_coupling.is_channels_last tells it."""
    last = v.ndim == 4 and v.shape[1] > 1 and v.stride(1) == 1 and v.shape[2] * v.shape[3] > 1
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(v.shape, dtype=dtype, device=v.device, memory_format=order)


@torch.library.register_fake("glf_fast::triton_affine_coupling")
def _(
    v: Tensor, u: Tensor, t: Tensor, log_scale: str, constant: float, add_first: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    check_fake(v)
    dtype = torch.promote_types(v.dtype, torch.float32)
    return _like(v, dtype), v.new_empty(v.shape[0], dtype=dtype)


@torch.library.register_fake("glf_fast::triton_affine_coupling_backward")
def _(
    grad_w: Tensor, grad_logdet: Tensor, v: Tensor, u: Tensor, t: Tensor, log_scale: str, constant: float,
    add_first: bool, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(v, v.dtype), _like(v, u.dtype), _like(v, t.dtype)


@torch.library.impl("glf_fast::triton_affine_coupling", ("cpu", "cuda"))
def _(
    v: Tensor, u: Tensor, t: Tensor, log_scale: str, constant: float, add_first: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    from glf_fast.kernels.affine_coupling import coupling_forward

    return coupling_forward(v, u, t, log_scale, constant, add_first, inverse)


@torch.library.impl("glf_fast::triton_affine_coupling_backward", ("cpu", "cuda"))
def _(
    grad_w: Tensor, grad_logdet: Tensor, v: Tensor, u: Tensor, t: Tensor, log_scale: str, constant: float,
    add_first: bool, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from glf_fast.kernels.affine_coupling import coupling_backward

    return coupling_backward(grad_w, grad_logdet, v, u, t, log_scale, constant, add_first, inverse)
