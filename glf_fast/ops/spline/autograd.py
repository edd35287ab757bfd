"""Splines as a differentiable function: first derivatives by the kernels, second ones by the reference."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.backends import Kernels
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted
from glf_fast.ops.spline.call import Call
from glf_fast.reference import Spline

__all__ = ["SplineKernels", "plain", "run"]


class SplineKernels(Kernels, Protocol):
    """Both passes of splines."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """y like x, and the sums of log-derivatives (rows,)."""

    def backward(self, call: Call, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Tensor, Tensor]:
        """∂x and ∂parameters; the gradients given are contiguous."""


def plain(call: Call) -> tuple[Tensor, Tensor]:
    """The reference as a function of a call."""
    y, log_slope = reference.spline(call.x, call.parameters, call.options, inverse=call.inverse)
    return y, log_slope.sum(1)


def run(kernels: SplineKernels, call: Call) -> tuple[Tensor, Tensor]:
    """The same by kernels that take this call."""
    x, parameters, options, inverse = call
    if torch.is_grad_enabled() and (x.requires_grad or parameters.requires_grad):
        return _Spline.apply(kernels, options, inverse, x, parameters)
    return kernels.forward(call)


class _Spline(torch.autograd.Function):
    """Keeps its arguments alone: the backward computes the bins again."""

    @staticmethod
    def forward(
        ctx: Any, kernels: SplineKernels, options: Spline, inverse: bool, x: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, ctx.options, ctx.inverse = kernels, options, inverse
        ctx.save_for_backward(x, parameters)
        return kernels.forward(Call(x, parameters, options, inverse))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, parameters = ctx.saved_tensors
        if plain_gradients_wanted(grads):

            def run(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
                return plain(Call(x, parameters, ctx.options, ctx.inverse))

            return None, None, None, *differentiate(run, (x, parameters), ctx.needs_input_grad[3:], grads)
        call = Call(x, parameters, ctx.options, ctx.inverse)
        return None, None, None, *ctx.kernels.backward(call, *(grad.contiguous() for grad in grads))
