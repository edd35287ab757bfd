"""A coupling flow and its density as differentiable functions: whatever the kernels, a flow is one node of autograd each way.

First derivatives come from the kernels, second ones from the reference. Arguments are checked, of one dtype and contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops import cpp, triton
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted
from glf_fast.ops.linear import slogdet_inverse
from glf_fast.ops.options import Options

__all__ = ["KERNELS", "coupling_flow", "log_prob", "plu_log_prob"]

KERNELS = {"cpp": cpp, "triton": triton}
ops = torch.ops.glf_fast


def coupling_flow(
    kernels: str,
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    layers: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
    reversible: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.coupling_flow`, or `coupling_flow_inverse` with options.inverse, by `KERNELS[kernels]`."""
    if _differentiable(x, context, matrix, offset, *layers):
        out, logdet = _CouplingFlow.apply(kernels, options, reversible, x, context, matrix, offset, *layers)
        return out, logdet
    out, logdet, _ = KERNELS[kernels].forward(x, matrix, offset, None, *_halves(layers), context, options, False)
    return out, logdet


def log_prob(
    kernels: str,
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    logabsdet: Tensor,
    layers: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
    reversible: bool,
) -> Tensor:
    """`reference.coupling_flow_log_prob`; options.density is True."""
    if _differentiable(x, context, matrix, offset, logabsdet, *layers):
        maps = (matrix, offset, logabsdet)
        return _LogProb.apply(kernels, options, reversible, None, None, x, context, *maps, *layers)
    halves = _halves(layers)
    _, density, _ = KERNELS[kernels].forward(x, matrix, offset, logabsdet, *halves, context, options, False)
    return density


def plu_log_prob(
    kernels: str,
    x: Tensor,
    permutation: Tensor,
    sign: Tensor,
    plu: Sequence[Tensor | None],
    layers: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
    reversible: bool,
) -> Tensor:
    """`reference.plu_flow_log_prob`; options.density is True, `plu` holds lower, upper, log_diag, log_scale and bias."""
    return _LogProb.apply(kernels, options, reversible, permutation, sign, x, context, *plu, *layers)


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _halves(layers: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return layers[: len(layers) // 2], layers[len(layers) // 2 :]


class _CouplingFlow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: str, options: Options, reversible: bool, x: Tensor, context: Tensor | None, matrix: Tensor,
        offset: Tensor, *layers: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, logdet, saved = KERNELS[kernels].forward(
            x, matrix, offset, None, *_halves(layers), context, options, not reversible
        )
        ctx.kernels, ctx.options, ctx.reversible = kernels, options, reversible
        # Only rebuilding needs the output; else its shape is enough, and the caller may change it in place.
        ctx.save_for_backward(out if reversible else x, saved, x, context, matrix, offset, *layers)
        return out, logdet

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        state, saved, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if plain_gradients_wanted(grads):
            run = partial(_reference_flow, ctx.options)
            return None, None, None, *differentiate(run, inputs, needs, grads)
        _, context, matrix, offset, *layers = inputs
        unmatrix = _inverse(matrix) if ctx.reversible else None
        grad_out, grad_logdet = (g.contiguous() for g in grads)
        parameters = any(needs[2:])
        grad_x, grad_context, *found = KERNELS[ctx.kernels].backward(
            grad_out, grad_logdet, state, saved, matrix, unmatrix, offset, *_halves(layers), context, ctx.options,
            parameters, needs[1],
        )  # fmt: skip
        if not parameters:
            found = [None] * (2 + len(layers))
        return None, None, None, grad_x, grad_context if needs[1] else None, *found


def _inverse(matrix: Tensor) -> Tensor:
    """A⁻¹ of (K, D, D): by our kernel in one launch, where torch.linalg takes ten, which a captured graph would repeat."""
    with torch.no_grad():
        return slogdet_inverse(matrix)[2].contiguous()


def _reference_flow(
    options: Options, x: Tensor, context: Tensor | None, matrix: Tensor, offset: Tensor, *layers: Tensor
) -> tuple[Tensor, ...]:
    run = reference.coupling_flow_inverse if options.inverse else reference.coupling_flow
    return run(x, matrix, offset, *_halves(layers), context, **options.of_flow())


class _LogProb(torch.autograd.Function):
    """The maps are (A, c, Σ log|det A|), or with a permutation (lower, upper, log_diag, log_scale, bias) of PLU layers.

    One node where there were three and seven tensor operations: 378 µs a training step where it was 529 (D = 8, H = 50,
    K = 5, B = 200, two Zen 5 cores).
    """

    @staticmethod
    def forward(
        ctx: Any, kernels: str, options: Options, reversible: bool, permutation: Tensor | None, sign: Tensor | None,
        x: Tensor, context: Tensor | None, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        unmatrix: Tensor | None = None
        if permutation is None:
            matrix, offset, logabsdet, *layers = tensors
        else:
            lower, upper, log_diag, log_scale, bias, *layers = tensors
            matrix, unmatrix, offset, logabsdet = ops.plu_assemble.default(
                permutation, lower, upper, log_diag, sign, log_scale, bias, reversible
            )
        z, density, saved = KERNELS[kernels].forward(
            x, matrix, offset, logabsdet, *_halves(layers), context, options, not reversible
        )
        ctx.kernels, ctx.options, ctx.reversible = kernels, options, reversible
        ctx.save_for_backward(z, saved, matrix, unmatrix, offset, permutation, sign, x, context, *tensors)
        return density

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        z, saved, matrix, unmatrix, offset, permutation, sign, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[5:]
        if plain_gradients_wanted([grad]):
            run = partial(_reference_log_prob, ctx.options, permutation, sign)
            return None, None, None, None, None, *differentiate(run, inputs, needs, [grad])
        _, context, *tensors = inputs
        layers = tensors[3 if permutation is None else 5 :]
        if ctx.reversible and permutation is None:
            unmatrix = _inverse(matrix)
        grad = grad.contiguous()
        parameters = any(needs[2:])
        grad_x, grad_context, *found = KERNELS[ctx.kernels].backward(
            None, grad, z, saved, matrix, unmatrix if ctx.reversible else None, offset,
            *_halves(layers), context, ctx.options, parameters, needs[1],
        )  # fmt: skip
        grad_maps: Sequence[Tensor | None] = [None] * (len(tensors) - len(layers))
        if parameters:
            grad_matrix, grad_offset, grad_logabsdet, *found = found
            if permutation is None:
                grad_maps = [grad_matrix, grad_offset, grad_logabsdet[0]]  # of the sum, and so of each term
            else:
                lower, upper, log_diag, log_scale, bias = tensors[:5]
                grad_maps = ops.plu_assemble_backward.default(
                    permutation, lower, upper, log_diag, sign, log_scale, bias, matrix, None, grad_matrix, None,
                    grad_offset, grad_logabsdet,
                )  # fmt: skip
                grad_maps = [*grad_maps, *[None] * (5 - len(grad_maps))]
        else:
            found = [None] * len(layers)
        return None, None, None, None, None, grad_x, grad_context if needs[1] else None, *grad_maps, *found


def _reference_log_prob(
    options: Options, permutation: Tensor | None, sign: Tensor, x: Tensor, context: Tensor | None, *tensors: Tensor
) -> tuple[Tensor]:
    if permutation is None:
        A, c, logabsdet, *layers = tensors
        return (reference.coupling_flow_log_prob(x, A, c, logabsdet, *_halves(layers), context, **options.of_flow()),)
    lower, upper, log_diag, log_scale, bias, *layers = tensors
    plu = (permutation, lower, upper, log_diag, sign, log_scale, bias)
    return (reference.plu_flow_log_prob(x, plu, *_halves(layers), context, **options.of_flow()),)
