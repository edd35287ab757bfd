"""Glow's networks as a differentiable function: first derivatives by the kernels, second ones by the reference."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.backends import Kernels
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted
from glf_fast.ops.glow_network.call import Call

__all__ = ["GlowKernels", "run"]


class GlowKernels(Kernels, Protocol):
    """Both passes of a Glow network."""

    def forward(self, call: Call) -> Tensor:
        """The output (B, O, H, W)."""

    def backward(self, call: Call, grad: Tensor) -> tuple[Tensor, ...]:
        """The gradients of all arguments."""


def run(kernels: GlowKernels, call: Call) -> Tensor:
    """The network by kernels that take this call."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call):
        return _Network.apply(kernels, *call)  # type: ignore[no-any-return]
    return kernels.forward(call)


class _Network(torch.autograd.Function):
    """Keeps its arguments alone: the backward computes the hidden layers again."""

    @staticmethod
    def forward(ctx: Any, kernels: GlowKernels, *tensors: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(*tensors)
        return kernels.forward(Call(*tensors))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        if plain_gradients_wanted((grad,)):

            def plain(*inputs: Tensor) -> tuple[Tensor]:
                return (reference.glow_network(*inputs),)

            return None, *differentiate(plain, tensors, ctx.needs_input_grad[1:], (grad,))
        return None, *ctx.kernels.backward(Call(*tensors), grad)
