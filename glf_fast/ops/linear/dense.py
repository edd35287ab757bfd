"""Dense layers by the compiled kernels: determinants and inverses as one differentiable function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glf_fast.ops.backends import CPP, CUDA
from glf_fast.ops.linear import schemas  # noqa: F401 — which defines the operations
from glf_fast.ops.linear.plu import MAX_CUDA_DIM

__all__ = ["BACKENDS", "refuses", "slogdet_inverse"]

BACKENDS = (CPP, CUDA)
operations = torch.ops.glf_fast


def refuses(W: Tensor) -> str:
    """Why the kernels cannot take these matrices; "" where they can."""
    return f"more than {MAX_CUDA_DIM} columns" if W.device.type == "cuda" and W.shape[-1] > MAX_CUDA_DIM else ""


def slogdet_inverse(W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.slogdet_inverse`; arguments are checked already."""
    *batch, dim, _ = W.shape
    flat = len(batch) == 1  # views take 4 µs, a tenth of 1,024 matrices of 4 × 4
    matrices = (W if flat else W.reshape(math.prod(batch), dim, dim)).contiguous()
    if torch.is_grad_enabled() and W.requires_grad:
        sign, logabsdet, inverse, info = _SlogdetInverse.apply(matrices)
    else:
        sign, logabsdet, inverse, info = operations.slogdet_inverse.default(matrices)
    if flat:
        return sign, logabsdet, inverse, info
    return sign.view(batch), logabsdet.view(batch), inverse.view(W.shape), info.view(batch)


class _SlogdetInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sign, logabsdet, inverse, info = operations.slogdet_inverse.default(W)
        ctx.mark_non_differentiable(sign, info)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inverse)
        return sign, logabsdet, inverse, info

    @staticmethod
    def backward(
        ctx: Any, _: Any, grad_logabsdet: Tensor | None, grad_inverse: Tensor | None, __: Any
    ) -> Tensor | None:
        # All of it differentiable again, since the inverse is an output.
        (inverse,) = ctx.saved_tensors
        grad = None if grad_logabsdet is None else grad_logabsdet[:, None, None] * inverse.mT
        if grad_inverse is not None:
            through_inverse = inverse.mT @ grad_inverse @ inverse.mT
            grad = -through_inverse if grad is None else grad - through_inverse
        return grad
