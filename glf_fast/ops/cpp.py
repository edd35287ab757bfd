"""The processor kernels (csrc/) as differentiable functions; a pass crosses into C++ once.

First derivatives come from the kernels, second ones from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.differentiate import differentiate, differentiate_flow
from glf_fast.ops.options import Options
from glf_fast.reference import ACTIVATIONS, LOG_SCALES

__all__ = ["affine_coupling", "coupling_flow"]

ACTIVATION = {name: i for i, name in enumerate(ACTIVATIONS)}
LOG_SCALE = {name: i for i, name in enumerate(LOG_SCALES)}

# What the forward keeps (csrc/cpu/flow.h, Save).
NOTHING, INPUTS, RECORDS = 0, 1, 2
# Keeping every hidden layer saves the backward a third of its arithmetic, as long as it stays in the last-level cache.
RECORDS_LIMIT = 32 << 20

ops = torch.ops.glf_fast


def coupling_code(options: Options) -> tuple[int, float, bool, bool]:
    """log_scale, constant, add_first, inverse, as the kernels take them."""
    return LOG_SCALE[options.log_scale], options.constant, options.add_first, options.inverse


def record_width(dim: int, widths: Sequence[int], context_dim: int, activation: str, itemsize: int) -> int:
    """Numbers that RECORDS keeps of a row and step: as csrc/cpu/record.h lays them out, which checks it."""
    line = 64 // itemsize
    layers = 2 if activation in ("silu", "gelu") else 1
    padded = [dim, dim, *([widths[0]] if context_dim else []), 2 * (dim // 2)]
    lines = sum(-(-n // line) + 1 for n in padded) + layers * sum(-(-n // line) for n in widths[1:-1])
    return line * (lines | 1)


def coupling_flow(
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
    reversible: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.coupling_flow`, or `coupling_flow_inverse` with options.inverse.

    The arguments are checked, of one dtype and contiguous.
    """
    tensors = (x, matrix, offset, context, *weights, *biases)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, logdet = _CouplingFlow.apply(options, reversible, *tensors)
        return out, logdet
    code = (ACTIVATION[options.activation], *coupling_code(options))
    out, logdet, _ = ops.cpu_coupling_flow.default(x, matrix, offset, weights, biases, context, *code, NOTHING, 0)
    return out, logdet


class _CouplingFlow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, reversible: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x, matrix, offset, context, *layers = tensors
        assert x is not None and matrix is not None
        weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        widths = [w.shape[1] for w in weights if w is not None] + [2 * (x.shape[1] // 2)]
        context_dim = 0 if context is None else context.shape[1]
        save, record = NOTHING, 0
        if not reversible:
            record = record_width(x.shape[1], widths, context_dim, options.activation, x.itemsize)
            save = RECORDS
            if len(matrix) * len(x) * record * x.itemsize > RECORDS_LIMIT:
                save, record = INPUTS, x.shape[1]
        code = (ACTIVATION[options.activation], *coupling_code(options))
        out, logdet, saved = ops.cpu_coupling_flow.default(
            x, matrix, offset, weights, biases, context, *code, save, record
        )
        ctx.options, ctx.code, ctx.save = options, code, save
        # Only rebuilding needs the output; else its shape is enough, and the caller may change it in place.
        ctx.save_for_backward(out if save == NOTHING else x, saved, *tensors)
        return out, logdet

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out, saved, x, matrix, offset, context, *layers = ctx.saved_tensors
        weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = (x, matrix, offset, context, *layers)
            return None, None, *differentiate_flow(ctx.options, inputs, ctx.needs_input_grad[2:], grads)
        needs = ctx.needs_input_grad
        parameters = any(needs[3:5]) or any(needs[6:])
        unmatrix = torch.linalg.inv(matrix).contiguous() if ctx.save == NOTHING else None
        grad_out, grad_logdet = (g.contiguous() for g in grads)
        grad_x, grad_context, *grad_parameters = ops.cpu_coupling_flow_backward.default(
            grad_out, grad_logdet, out, saved, matrix, unmatrix, offset, weights, biases, context,
            *ctx.code, ctx.save, parameters,
        )  # fmt: skip
        if not parameters:
            grad_parameters = [None] * (2 + len(layers))
        return (
            None,
            None,
            grad_x,
            *grad_parameters[:2],
            None if context is None else grad_context,
            *grad_parameters[2:],
        )


def affine_coupling(v: Tensor, u: Tensor, t: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """`reference.affine_coupling`; arguments are checked already, and of v's dtype."""
    shape = v.shape
    rows = [_rows(x) for x in (v, u, t)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in rows):
        w, logdet = _AffineCoupling.apply(options, *rows)
    else:
        w, logdet = ops.cpu_affine_coupling.default(*rows, *coupling_code(options))
    return w.view(shape), logdet


def _rows(x: Tensor) -> Tensor:
    """(B, n) with every row in one piece; rows may lie apart, as the halves of a split do."""
    x = x.flatten(1)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


class _AffineCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, v: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        ctx.options = options
        ctx.save_for_backward(v, u, t)
        w, logdet = ops.cpu_affine_coupling.default(v, u, t, *coupling_code(options))
        return w, logdet

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            options = {name: getattr(ctx.options, name) for name in ("log_scale", "log_scale_constant", "add_first")}

            def run(v: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
                return reference.affine_coupling(v, u, t, **options, inverse=ctx.options.inverse)

            return None, *differentiate(run, inputs, ctx.needs_input_grad[1:], grads)
        grad_w, grad_logdet = (g.contiguous() for g in grads)
        return None, *ops.cpu_affine_coupling_backward.default(
            grad_w, grad_logdet, *inputs, *coupling_code(ctx.options)
        )
