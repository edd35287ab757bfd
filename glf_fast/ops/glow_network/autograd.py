"""Glow's networks as a differentiable function: first derivatives by the kernels, second ones by the reference."""

from __future__ import annotations

from collections.abc import Sequence
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

    def backward(self, call: Call, grad: Tensor) -> Sequence[Tensor]:
        """The gradients of all tensors."""


def run(kernels: GlowKernels, call: Call) -> Tensor:
    """The network by kernels that take this call."""
    *tensors, gain_factor = call
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Network.apply(kernels, gain_factor, *tensors)
    return kernels.forward(call)


class _Network(torch.autograd.Function):
    """Keeps its arguments alone: the backward computes the hidden layers again."""

    @staticmethod
    def forward(ctx: Any, kernels: GlowKernels, gain_factor: float, *tensors: Tensor) -> Tensor:
        ctx.kernels, ctx.gain_factor = kernels, gain_factor
        ctx.save_for_backward(*tensors)
        return kernels.forward(Call.of(tensors, gain_factor))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors, gain_factor = ctx.saved_tensors, ctx.gain_factor
        if plain_gradients_wanted((grad,)):

            def plain(*inputs: Tensor) -> tuple[Tensor]:
                return (reference.glow_network(*Call.of(inputs, gain_factor)),)

            return None, None, *differentiate(plain, tensors, ctx.needs_input_grad[2:], (grad,))
        return None, None, *ctx.kernels.backward(Call.of(tensors, gain_factor), grad)
