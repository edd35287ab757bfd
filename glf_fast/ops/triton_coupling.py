"""The elementwise affine coupling on a GPU (kernels/affine_coupling.py) as a differentiable function.

One launch each way; two for the forward of few large samples.

First derivatives come from the kernels, second ones from the reference. Triton is imported when the first kernel runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted
from glf_fast.ops.options import Options

__all__ = ["affine_coupling"]

OPTIONS = "str log_scale, float constant, bool add_first, bool inverse"
torch.library.define(
    "glf_fast::triton_affine_coupling", f"(Tensor v, Tensor u, Tensor t, {OPTIONS}) -> (Tensor, Tensor)"
)
torch.library.define(
    "glf_fast::triton_affine_coupling_backward",
    f"(Tensor grad_w, Tensor grad_logdet, Tensor v, Tensor u, Tensor t, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
ops = torch.ops.glf_fast


def affine_coupling(v: Tensor, u: Tensor, t: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """`reference.affine_coupling`; arguments are checked already. u and t may be of any precision, as they come."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (v, u, t)):
        w, logdet = _AffineCoupling.apply(options, v, u, t)
        return w, logdet
    return ops.triton_affine_coupling.default(v, u, t, *_code(options))


def _code(options: Options) -> tuple[str, float, bool, bool]:
    """OPTIONS of the operations."""
    return options.log_scale, options.constant, options.add_first, options.inverse


class _AffineCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, v: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        ctx.options = options
        ctx.save_for_backward(v, u, t)
        w, logdet = ops.triton_affine_coupling.default(v, u, t, *_code(options))
        return w, logdet

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        options: Options = ctx.options
        if plain_gradients_wanted(grads):
            run = partial(reference.affine_coupling, **options.of_coupling())
            return None, *differentiate(run, inputs, ctx.needs_input_grad[1:], grads)
        return None, *ops.triton_affine_coupling_backward.default(*grads, *inputs, *_code(options))


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
    dtype = torch.promote_types(v.dtype, torch.float32)
    return _like(v, dtype), v.new_empty(len(v), dtype=dtype)


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
