"""A coupling flow and its density as one differentiable function: whatever the kernels, one node of autograd each way.

First derivatives come from the kernels, second ones from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glf_fast.ops.backends import Kernels, recorded
from glf_fast.ops.coupling_flow import plain
from glf_fast.ops.coupling_flow.call import Call, CallOptions, Maps
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted
from glf_fast.ops.linear import plu as plu_layers
from glf_fast.ops.linear import slogdet_inverse
from glf_fast.reference import Plu

__all__ = ["FlowKernels", "call_of", "contiguous", "run", "take"]

operations = torch.ops.glf_fast


class FlowKernels(Kernels, Protocol):
    """Both passes of a flow, on contiguous tensors of one dtype. The maps of their calls are never PLU factors."""

    def adapt(self, call: Call) -> Call:
        """The call as these kernels know it, a differentiable function of it."""

    def forward(self, call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output, logdet, which is the density if options.density, and with `keep` what the backward starts from."""

    def backward(
        self, call: Call, state: Tensor, saved: Tensor, unmatrix: Tensor | None, grad_out: Tensor | None,
        grad_logdet: Tensor, parameters: bool, of_context: bool, of_matrix: bool,
    ) -> list[Tensor]:  # fmt: skip
        """∂x, ∂context (may be of any shape unless `of_context`) and, with `parameters`, ∂matrix (the same unless `of_matrix`),
        ∂offset, of a density ∂logabsdet (K,), ∂weights …, ∂biases …

        Without `unmatrix` from what the forward kept; with it, `matrix` inverted, from the output `state`. A density's `state`
        is the output in either case, and its `grad_out` None.
        """


def run(kernels: FlowKernels, call: Call) -> tuple[Tensor, ...]:
    """Output and logdet, or the density alone, by kernels that take this call."""
    call = kernels.adapt(call)
    tensors = contiguous(call)
    return take(kernels, call.options, tensors, recorded(tensors))


def take(
    kernels: FlowKernels, options: CallOptions, tensors: Sequence[Tensor | None], record: bool
) -> tuple[Tensor, ...]:
    """The same of tensors that come as `contiguous` lists them; `record` says whether they are `recorded`."""
    if record:
        found = _CouplingFlow.apply(kernels, options, *tensors)
        return (found,) if options.density else found
    out, logdet, _ = kernels.forward(call_of(options, tensors), False)
    return (logdet,) if options.density else (out, logdet)


def contiguous(call: Call) -> list[Tensor | None]:
    """The call's tensors, contiguous and, but for a permutation, of x's dtype: autocast makes computed offsets bfloat16."""
    x, context, maps, weights, biases, _, seed = call
    dtype, last = x.dtype, () if seed is None else (seed,)
    return [
        t if t is None or (t.dtype == dtype and t.is_contiguous()) else _converted(t, dtype)
        for t in (x, context, *maps, *weights, *biases, *last)
    ]


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def call_of(options: CallOptions, tensors: Sequence[Any]) -> Call:
    """The call of tensors that come as `contiguous` lists them."""
    kind: type[Maps] | type[Plu] = Plu if options.plu else Maps
    start = 2 + len(kind._fields)
    seed = None
    if options.dropout:
        *tensors, seed = tensors
    half = (start + len(tensors)) // 2
    return Call(tensors[0], tensors[1], kind(*tensors[2:start]), tensors[start:half], tensors[half:], options, seed)


class _CouplingFlow(torch.autograd.Function):
    """The tensors are those of a call, as `contiguous` lists them.

    One node, PLU layers and density included, where there were three and seven tensor operations: 378 µs a training step where
    it was 529 (D = 8, H = 50, K = 5, B = 200, two Zen 5 cores).
    """

    @staticmethod
    def forward(
        ctx: Any, kernels: FlowKernels, options: CallOptions, *tensors: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        call = call_of(options, tensors)
        assembled: tuple[Tensor | None, ...] = (None, None, None)
        if isinstance(call.maps, Plu):
            matrix, unmatrix, offset, logabsdets = operations.plu_assemble.default(*call.maps, options.reversible)
            assembled = (matrix, unmatrix, offset)
            call = call._replace(maps=Maps(matrix, offset, logabsdets))
        out, logdet, saved = kernels.forward(call, not options.reversible)
        ctx.kernels, ctx.options = kernels, options
        # Where it is not needed, the output may be changed in place by the caller.
        state = out if options.reversible or options.density else call.x
        ctx.save_for_backward(state, saved, *assembled, *tensors)
        return logdet if options.density else (out, logdet)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        state, saved, matrix, unmatrix, offset, *tensors = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs_input_grad[2:]
        if plain_gradients_wanted(grads):
            return None, None, *differentiate(lambda *t: plain.run(call_of(options, t)), tensors, needs, grads)
        call = call_of(options, tensors)
        given = call.maps
        if isinstance(given, Plu):
            call = call._replace(maps=Maps(matrix, offset, None))
        else:
            unmatrix = _inverse(given.matrix) if options.reversible else None
        parameters = any(needs[2:])
        grad_out, grad_logdet = (None, grads[0]) if options.density else (grads[0].contiguous(), grads[1])
        grad_x, grad_context, *found = ctx.kernels.backward(
            call, state, saved, unmatrix if options.reversible else None, grad_out, grad_logdet.contiguous(), parameters,
            needs[1], isinstance(given, Plu) or needs[2],
        )  # fmt: skip
        grad_maps: list[Tensor | None] = [None] * len(given)
        if not parameters:
            found = [None] * (len(call.weights) + len(call.biases))
        elif isinstance(given, Plu):
            grad_matrix, grad_offset, grad_logabsdets, *found = found
            made = operations.plu_assemble_backward.default(
                *given, matrix, None, grad_matrix, None, grad_offset, grad_logabsdets
            )
            grad_maps = plu_layers.gradients(made)
        elif options.density:
            grad_matrix, grad_offset, grad_logabsdets, *found = found
            grad_maps = [grad_matrix, grad_offset, grad_logabsdets[0]]  # of the sum, and so of each term
        else:
            grad_maps[:2], found = found[:2], found[2:]
        if not isinstance(given, Plu) and not needs[2]:
            grad_maps[0] = None
        last = [None] * (call.seed is not None)
        return None, None, grad_x, grad_context if needs[1] else None, *grad_maps, *found, *last


def _inverse(matrix: Tensor) -> Tensor:
    """A⁻¹ of (K, D, D): by our kernel in one launch, where torch.linalg takes ten, which a captured graph would repeat."""
    with torch.no_grad():
        return slogdet_inverse(matrix)[2].contiguous()
