"""The processor kernels of invertible linear layers as differentiable functions; a pass crosses into C++ once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.differentiate import differentiate

__all__ = ["plu_assemble"]

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
        A, A_inv, c, logabsdet = ops.cpu_plu_assemble.default(
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
        A, A_inv, c, logabsdet = ops.cpu_plu_assemble.default(
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
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def run(*tensors: Tensor) -> tuple[Tensor, ...]:
                lower, upper, log_diag, log_scale, bias = tensors
                out = reference.plu_assemble(
                    permutation, lower, upper, log_diag, sign, log_scale, bias, need_inverse=ctx.need_inverse
                )
                return tuple(t for t, g in zip(out, grads, strict=True) if t is not None and g is not None)

            given = [g for g in grads if g is not None]
            return None, None, None, *differentiate(run, tensors, ctx.needs_input_grad[3:], given)
        grad_A, grad_A_inv, grad_c, grad_logabsdet = (None if g is None else g.contiguous() for g in grads)
        found = ops.cpu_plu_assemble_backward.default(
            permutation, lower, upper, log_diag, sign, log_scale, bias, A, A_inv if ctx.need_inverse else None,
            grad_A, grad_A_inv if ctx.need_inverse else None, grad_c, grad_logabsdet,
        )  # fmt: skip
        return None, None, None, *found, *([None, None] if log_scale is None else [])
