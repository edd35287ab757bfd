"""The elementwise affine coupling as a differentiable function: first derivatives by the kernels, second by the reference."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.affine_coupling.call import AffineOptions, Call
from glf_fast.ops.backends import Kernels
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted

__all__ = ["AffineKernels", "run"]


class AffineKernels(Kernels, Protocol):
    """Both passes of the coupling."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """w, in v's order of memory, and logdet (B,)."""

    def backward(self, call: Call, grad_w: Tensor, grad_logdet: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """∂v, ∂u, ∂t, each in the precision of its operand."""


def run(kernels: AffineKernels, call: Call) -> tuple[Tensor, Tensor]:
    """`reference.affine_coupling` by kernels that take this call."""
    v, u, t, options = call
    if torch.is_grad_enabled() and (v.requires_grad or u.requires_grad or t.requires_grad):
        return _AffineCoupling.apply(kernels, options, v, u, t)
    return kernels.forward(call)


class _AffineCoupling(torch.autograd.Function):
    """The coupling and all views of its operands as one node: separate nodes cost more than the kernels on few images."""

    @staticmethod
    def forward(
        ctx: Any, kernels: AffineKernels, options: AffineOptions, v: Tensor, u: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, ctx.options = kernels, options
        ctx.save_for_backward(v, u, t)
        return kernels.forward(Call(v, u, t, options))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (v, u, t), options = ctx.saved_tensors, ctx.options
        if plain_gradients_wanted(grads):
            run = partial(reference.affine_coupling, **options.keywords())
            return None, None, *differentiate(run, (v, u, t), ctx.needs_input_grad[2:], grads)
        return None, None, *ctx.kernels.backward(Call(v, u, t, options), *grads)
