"""The processor kernels (csrc/cpu): both passes of a whole flow, and the elementwise coupling as a differentiable function.

A pass crosses into C++ once. First derivatives come from the kernels, second ones from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted
from glf_fast.ops.options import Options
from glf_fast.reference import ACTIVATIONS, LOG_SCALES

__all__ = ["affine_coupling", "backward", "forward"]

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


def record_width(dim: int, weights: Sequence[Tensor], context_dim: int, activation: str) -> int:
    """Numbers that RECORDS keeps of a row and step: as csrc/cpu/record.h lays them out, which checks it."""
    line = 64 // weights[0].itemsize
    networks = 2 if weights[0].ndim == 4 else 1
    layers = 2 if activation in ("silu", "gelu") else 1
    padded = [dim, dim, *([weights[0].shape[-2]] if context_dim else []), networks * weights[-1].shape[-1]]
    hidden = sum(-(-w.shape[-1] // line) for w in weights[:-1])
    lines = sum(-(-n // line) + 1 for n in padded) + layers * networks * hidden
    return line * (lines | 1)


def forward(
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    logabsdet: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logdet and, with `keep`, what the backward starts from.

    To the logdet options.density adds log N(out; 0, I), and `logabsdet`, (K,) or (), its sum.
    """
    save, record = NOTHING, 0
    if keep:
        context_dim = 0 if context is None else context.shape[1]
        save, record = RECORDS, record_width(x.shape[1], weights, context_dim, options.activation)
        if len(matrix) * len(x) * record * x.itemsize > RECORDS_LIMIT:
            save, record = INPUTS, x.shape[1]
    code = (ACTIVATION[options.activation], *coupling_code(options), options.density, save, record)
    out, logdet, saved = ops.cpu_coupling_flow.default(x, matrix, offset, weights, biases, context, *code)
    return out, logdet if logabsdet is None else logdet + logabsdet.sum(), saved


def backward(
    grad_out: Tensor | None,
    grad_logdet: Tensor,
    state: Tensor,
    saved: Tensor,
    matrix: Tensor,
    unmatrix: Tensor | None,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
    parameters: bool,
    of_context: bool,
) -> list[Tensor]:
    """∂x, ∂context (empty without one, made even if not `of_context`) and, with `parameters`, ∂matrix, ∂offset, of the density
    ∂logabsdet (K,), ∂weights …, ∂biases …

    Without `unmatrix` from what the forward kept, with it (`matrix` inverted) from the output `state`, which the density
    needs in any case: `grad_out` is None then.
    """
    save = NOTHING if unmatrix is not None else INPUTS if saved.shape[-1] == state.shape[1] else RECORDS
    code = (ACTIVATION[options.activation], *coupling_code(options), save, parameters)
    found = ops.cpu_coupling_flow_backward.default(
        grad_out, grad_logdet, state, saved, matrix, unmatrix, offset, weights, biases, context, *code
    )
    if parameters and options.density:
        return [*found[:4], grad_logdet.sum().expand(len(matrix)).contiguous(), *found[4:]]
    return found


def affine_coupling(v: Tensor, u: Tensor, t: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """`reference.affine_coupling`, w in v's order of memory; arguments are checked already, and of v's dtype."""
    if torch.is_grad_enabled() and (v.requires_grad or u.requires_grad or t.requires_grad):
        return _AffineCoupling.apply(options, v, u, t)
    return _couple(options, v, u, t)


def _couple(options: Options, v: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    last = _channels_last(v)
    samples = [_samples(x, last) for x in (v, u, t)]
    w, logdet = ops.cpu_affine_coupling.default(*samples, *coupling_code(options))
    return _image(w, v.shape, last), logdet


def _channels_last(x: Tensor) -> bool:
    return x.ndim > 2 and x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2:].numel() > 1


def _samples(x: Tensor, channels_last: bool) -> Tensor:
    """(B, n), or (B, pixels, channels); only the last dimension is in one piece: halves of a split are not copied."""
    x = x.flatten(2).mT if channels_last else x.flatten(1)
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # an empty x calls itself contiguous, with any strides


def _image(samples: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """What `_samples` made of an image, as an image again."""
    return (samples.mT if channels_last else samples).view(shape)


class _AffineCoupling(torch.autograd.Function):
    """With all views inside: as nodes of the graph they cost more than the kernel does on a few small images."""

    @staticmethod
    def forward(ctx: Any, options: Options, v: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        ctx.options = options
        ctx.save_for_backward(v, u, t)
        return _couple(options, v, u, t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        if plain_gradients_wanted(grads):
            run = partial(reference.affine_coupling, **ctx.options.of_coupling())

            return None, *differentiate(run, inputs, ctx.needs_input_grad[1:], grads)
        v = inputs[0]
        last = _channels_last(v)
        grad_w, grad_logdet = _samples(grads[0], last).contiguous(), grads[1].contiguous()
        samples = [_samples(x, last) for x in inputs]
        found = ops.cpu_affine_coupling_backward.default(grad_w, grad_logdet, *samples, *coupling_code(ctx.options))
        return None, *(_image(grad, v.shape, last) for grad in found)
