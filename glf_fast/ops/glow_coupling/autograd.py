"""Glow's couplings as a differentiable function: first derivatives by the kernels, second ones by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.backends import Kernels
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted
from glf_fast.ops.glow_coupling.call import Call, GlowOptions, in_steps, with_tensors

__all__ = ["GlowCouplingKernels", "run"]


class GlowCouplingKernels(Kernels, Protocol):
    """Both passes of a coupling."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """y (B, H, W, D), logdet (B,), and what the network made."""

    def backward(self, call: Call, made: Tensor, grad_y: Tensor, grad_logdet: Tensor) -> Sequence[Tensor]:
        """The gradients of x and of the parameters."""


def run(kernels: GlowCouplingKernels, call: Call) -> tuple[Tensor, Tensor]:
    """The coupling by kernels that take this call."""
    tensors = (call.x, *call.parameters)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        y, logdet = _Coupling.apply(kernels, call.options, *tensors)
    else:
        y, logdet, _ = kernels.forward(call)
    y = y.movedim(-1, 1)  # not in the function, whose outputs may be changed in place only if they are no views
    return y.contiguous() if call.x.is_contiguous() else y, logdet


class _Coupling(torch.autograd.Function):
    """Division, network, coupling and joining as one node. Keeps its arguments and what the network made."""

    @staticmethod
    def forward(
        ctx: Any, kernels: GlowCouplingKernels, options: GlowOptions, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, logdet, made = kernels.forward(with_tensors(options, tensors))
        ctx.kernels, ctx.options = kernels, options
        ctx.save_for_backward(*tensors, made)
        return y, logdet

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *tensors, made = ctx.saved_tensors
        options = ctx.options
        if plain_gradients_wanted(grads):

            def plain(*inputs: Tensor) -> tuple[Tensor, Tensor]:
                call = with_tensors(options, inputs)
                y, logdet = in_steps(call, reference.glow_network, reference.affine_coupling)
                return y.movedim(1, -1), logdet

            return None, None, *differentiate(plain, tensors, ctx.needs_input_grad[2:], grads)
        return None, None, *ctx.kernels.backward(with_tensors(options, tensors), made, *grads)
