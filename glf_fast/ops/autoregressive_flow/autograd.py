"""An autoregressive flow and its density as one differentiable function.

First derivatives come from the kernels, those of the inverse by its implicit function; second ones from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glf_fast.ops.autoregressive_flow import plain
from glf_fast.ops.autoregressive_flow.call import Call, CallOptions
from glf_fast.ops.backends import Kernels, recorded
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted

__all__ = ["AutoregressiveKernels", "run", "take"]


class AutoregressiveKernels(Kernels, Protocol):
    """Both passes of a flow, on contiguous tensors of one dtype."""

    def adapt(self, call: Call) -> Call:
        """The call as these kernels take it."""

    def forward(self, call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output, logdet, which is the density if options.density, and with `keep` what the backward starts from."""

    def backward(
        self, call: Call, state: Tensor, saved: Tensor, grad_out: Tensor | None, grad_logdet: Tensor, parameters: bool,
        of_context: bool,
    ) -> list[Tensor]:  # fmt: skip
        """∂x, ∂context (of any shape unless `of_context`) and, with `parameters`, ∂matrix, ∂offset, ∂weights …, ∂biases …

        A density's `state` is the output, and its `grad_out` None.
        """


def run(kernels: AutoregressiveKernels, call: Call) -> tuple[Tensor, ...]:
    """Output and logdet, or the density alone, by kernels that take this call."""
    call = kernels.adapt(call)
    tensors = _contiguous(call)
    return take(kernels, call.options, tensors, recorded(tensors))


def take(
    kernels: AutoregressiveKernels, options: CallOptions, tensors: Sequence[Tensor | None], record: bool
) -> tuple[Tensor, ...]:
    """The same of tensors that come as `_contiguous` lists them; `record` says whether they are `recorded`."""
    if record:
        found = _AutoregressiveFlow.apply(kernels, options, *tensors)
        return (found,) if options.density else found
    out, logdet, _ = kernels.forward(_call_of(options, tensors), False)
    return (logdet,) if options.density else (out, logdet)


def _contiguous(call: Call) -> list[Tensor | None]:
    """The call's tensors, contiguous and, but for `fan_in`, of x's dtype: autocast makes computed offsets bfloat16."""
    *tensors, weights, biases, _ = call
    dtype = call.x.dtype
    return [
        t
        if t is None or (t.dtype == dtype and t.is_contiguous())
        else (t.to(dtype) if t.is_floating_point() else t).contiguous()
        for t in (*tensors, *weights, *biases)
    ]


def _call_of(options: CallOptions, tensors: Sequence[Any]) -> Call:
    """The call of tensors that come as `_contiguous` lists them."""
    x, context, matrix, offset, logabsdet, fan_in, *layers = tensors
    half = len(layers) // 2
    return Call(x, context, matrix, offset, logabsdet, fan_in, layers[:half], layers[half:], options)


class _AutoregressiveFlow(torch.autograd.Function):
    """The tensors are those of a call, as `_contiguous` lists them."""

    @staticmethod
    def forward(
        ctx: Any, kernels: AutoregressiveKernels, options: CallOptions, *tensors: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        call = _call_of(options, tensors)
        out, logdet, saved = kernels.forward(call, True)
        ctx.kernels, ctx.options = kernels, options
        # Where it is not needed, the output may be changed in place by the caller.
        ctx.save_for_backward(out if options.density else call.x, saved, *tensors)
        return logdet if options.density else (out, logdet)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        state, saved, *tensors = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs_input_grad[2:]
        if plain_gradients_wanted(grads):
            return None, None, *differentiate(lambda *t: plain.run(_call_of(options, t)), tensors, needs, grads)
        call = _call_of(options, tensors)
        parameters = any(needs[2:])
        grad_out, grad_logdet = (None, grads[0]) if options.density else (grads[0].contiguous(), grads[1])
        grad_x, grad_context, *found = ctx.kernels.backward(
            call, state, saved, grad_out, grad_logdet.contiguous(), parameters, needs[1]
        )
        if not parameters:
            found = [None] * (2 + len(call.weights) + len(call.biases))
        grad_logabsdet = grad_logdet.sum() if options.density else None
        return None, None, grad_x, grad_context if needs[1] else None, *found[:2], grad_logabsdet, None, *found[2:]
