"""The compiled kernels of invertible linear layers as differentiable functions; a pass crosses into C++ once.

The operations have one name on all devices: torch runs what csrc/cpu or csrc/cuda holds for the tensors' own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted

__all__ = ["lu_factor", "plu_assemble", "slogdet_inverse"]

ops = torch.ops.glf_fast


def plu_assemble(
    permutation: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diag: Tensor,
    sign: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    need_inverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`reference.plu_assemble`; arguments are checked already, and floating-point ones have the dtype of `lower`."""
    *batch, dim = permutation.shape
    flat = len(batch) == 1

    def rows(t: Tensor | None, inner: tuple[int, ...]) -> Tensor | None:
        if t is None:
            return None
        return (t if flat else t.reshape(-1, *inner)).contiguous()

    vectors = [rows(t, (dim,)) for t in (permutation, log_diag, sign, log_scale, bias)]
    permutation, log_diag, sign, log_scale, bias = vectors  # type: ignore[assignment]
    lower, upper = (rows(t, (dim, dim)) for t in (lower, upper))  # type: ignore[assignment]
    tensors = (lower, upper, log_diag, log_scale, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        A, A_inv, c, logabsdet = _PLUAssemble.apply(need_inverse, permutation, sign, *tensors)
    else:
        A, A_inv, c, logabsdet = ops.plu_assemble.default(
            permutation, lower, upper, log_diag, sign, log_scale, bias, need_inverse
        )
    if not flat:
        A, c, logabsdet = A.view(*batch, dim, dim), c.view(*batch, dim), logabsdet.view(batch)
        A_inv = A_inv.view(*batch, dim, dim) if need_inverse else None
    return A, A_inv if need_inverse else None, c, logabsdet


class _PLUAssemble(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, need_inverse: bool, permutation: Tensor, sign: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lower, upper, log_diag, log_scale, bias = tensors
        A, A_inv, c, logabsdet = ops.plu_assemble.default(
            permutation, lower, upper, log_diag, sign, log_scale, bias, need_inverse
        )
        ctx.need_inverse = need_inverse
        if log_scale is None:
            ctx.mark_non_differentiable(c)  # zero
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A, A_inv, permutation, sign, *tensors)
        return A, A_inv, c, logabsdet

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        A, A_inv, permutation, sign, *tensors = ctx.saved_tensors
        lower, upper, log_diag, log_scale, bias = tensors
        if plain_gradients_wanted(grads):

            def run(*tensors: Tensor) -> tuple[Tensor, ...]:
                lower, upper, log_diag, log_scale, bias = tensors
                out = reference.plu_assemble(
                    permutation, lower, upper, log_diag, sign, log_scale, bias, need_inverse=ctx.need_inverse
                )
                return tuple(t for t, g in zip(out, grads, strict=True) if t is not None and g is not None)

            given = [g for g in grads if g is not None]
            return None, None, None, *differentiate(run, tensors, ctx.needs_input_grad[3:], given)
        grad_A, grad_A_inv, grad_c, grad_logabsdet = (None if g is None else g.contiguous() for g in grads)
        found = ops.plu_assemble_backward.default(
            permutation, lower, upper, log_diag, sign, log_scale, bias, A, A_inv if ctx.need_inverse else None,
            grad_A, grad_A_inv if ctx.need_inverse else None, grad_c, grad_logabsdet,
        )  # fmt: skip
        return None, None, None, *found, *([None, None] if log_scale is None else [])


def slogdet_inverse(W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.slogdet_inverse`; arguments are checked already."""
    *batch, dim, _ = W.shape
    flat = len(batch) == 1  # views take 4 µs, a tenth of 1,024 matrices of 4 × 4
    matrices = (W if flat else W.reshape(math.prod(batch), dim, dim)).contiguous()
    if torch.is_grad_enabled() and W.requires_grad:
        sign, logabsdet, inverse, info = _SlogdetInverse.apply(matrices)
    else:
        sign, logabsdet, inverse, info = ops.slogdet_inverse.default(matrices)
    if flat:
        return sign, logabsdet, inverse, info
    return sign.view(batch), logabsdet.view(batch), inverse.view(W.shape), info.view(batch)


class _SlogdetInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sign, logabsdet, inverse, info = ops.slogdet_inverse.default(W)
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


def lu_factor(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.lu_factor`; arguments are checked already."""
    *batch, dim, _ = W.shape
    matrices = W.reshape(math.prod(batch), dim, dim).contiguous()
    if torch.is_grad_enabled() and W.requires_grad:
        factors, pivots, info = _LUFactor.apply(matrices)
    else:
        factors, pivots, info = ops.lu_factor.default(matrices)
    return factors.view(W.shape), pivots.view(*batch, dim), info.view(batch)


class _LUFactor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factors, pivots, info = ops.lu_factor.default(W)
        ctx.mark_non_differentiable(pivots, info)
        ctx.save_for_backward(factors, pivots)
        return factors, pivots, info

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any, __: Any) -> Tensor:
        # ∂W = P L⁻ᵀ [tril(Lᵀ ∂L, −1) + triu(∂U Uᵀ)] U⁻ᵀ, differentiable again.
        factors, pivots = ctx.saved_tensors
        P, L, U = torch.lu_unpack(factors, pivots)
        inner = (L.mT @ grad.tril(-1)).tril(-1) + (grad.triu() @ U.mT).triu()
        right = torch.linalg.solve_triangular(U.mT, inner, upper=False, left=False)
        return P @ torch.linalg.solve_triangular(L.mT, right, upper=True, unitriangular=True)
