"""The whole autoregressive flow on a processor (csrc/cpu): a pass crosses into C++ once, in either direction."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.autoregressive_flow.call import Call, CallOptions
from glf_fast.ops.backends import CPP
from glf_fast.ops.checks import check_fake
from glf_fast.ops.codes import ACTIVATION_CODES, COUPLING_CODES, LOG_SCALE_CODES, NETWORK_CODES
from glf_fast.reference import NEED_INPUT

__all__ = ["BACKENDS", "adapt", "backward", "forward", "refuses"]

BACKENDS = (CPP,)
MAX_LAYERS = 17  # of a network, without the context's own
# What the forward keeps (csrc/cpu/flow.h, Save).
NOTHING, INPUTS, RECORDS = 0, 1, 2
# Keeping every hidden layer saves the backward a third of its arithmetic, as long as it stays in the last-level cache.
RECORDS_LIMIT = 32 << 20
operations = torch.ops.glf_fast


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call; "" where they can."""
    options = call.options
    if not 1 <= len(call.weights) - options.context_layer <= MAX_LAYERS:
        return f"a network of more than {MAX_LAYERS} layers"
    if not (
        options.transform in COUPLING_CODES
        and options.network in NETWORK_CODES
        and options.activation in ACTIVATION_CODES
        and options.log_scale in LOG_SCALE_CODES
    ):
        return "csrc has no such transform, network, activation or log-scale"
    return ""


def adapt(call: Call) -> Call:
    """The call as it is: the products' precision is the state's."""
    return call


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logdet, which is the density if options.density, and with `keep` what the backward starts from."""
    x, context, matrix, offset, logabsdet, fan_in, weights, biases, options = call
    save, units = NOTHING, 0
    if keep:
        save, units = RECORDS, record_units(call)
        if len(matrix) * len(x) * units * x.itemsize > RECORDS_LIMIT:
            save, units = INPUTS, x.shape[1]
    out, logdet, saved = operations.cpu_autoregressive_flow.default(
        x, matrix, offset, weights, biases, fan_in, context, *_numbers(options), options.density, save, units
    )
    return out, logdet if logabsdet is None else logdet + logabsdet, saved


def backward(
    call: Call, state: Tensor, saved: Tensor, grad_out: Tensor | None, grad_logdet: Tensor, parameters: bool, of_context: bool
) -> list[Tensor]:  # fmt: skip
    """∂x, ∂context (of any shape unless `of_context`) and, with `parameters`, ∂matrix, ∂offset, ∂weights …, ∂biases …

    `state` is the output of a density, and x or the output else; a density's `grad_out` is None.
    """
    x, context, matrix, offset, _, fan_in, weights, biases, options = call
    save = INPUTS if saved.shape[2] == x.shape[1] else RECORDS
    return operations.cpu_autoregressive_flow_backward.default(
        grad_out, grad_logdet, state, saved, matrix, offset, weights, biases, fan_in, context, *_numbers(options), save,
        parameters, of_context,
    )  # fmt: skip


def record_units(call: Call) -> int:
    """Numbers that RECORDS keeps of a row and step: as csrc/cpu/autoregressive.h lays them out, which checks it."""
    options, dim = call.options, call.x.shape[1]
    argument = options.activation in NEED_INPUT  # which is kept besides the value
    widths = [bias.shape[1] for bias in call.biases]
    if options.context_layer:
        widths, own = widths[:-1], (1 + argument) * widths[-1]
    else:
        own = 0
    *hidden, raw = widths
    if options.network == "residual":  # the stream is kept besides its activation, but for the last
        both = sum((1 + (argument or i % 2 == 0)) * width for i, width in enumerate(hidden[:-1])) + hidden[-1]
    elif options.network == "skip":  # the stream has no activation
        both = sum((1 + argument * (i % 2)) * width for i, width in enumerate(hidden))
    else:
        both = (1 + argument) * sum(hidden)
    return (3 if options.inverse else 2) * dim + own + both + raw


def _numbers(options: CallOptions) -> tuple[int, int, int, float, int, float, list[float], bool, bool]:
    """transform, network, activation and its constant, log_scale and its constant, spline, context_layer, inverse."""
    return (
        COUPLING_CODES[options.transform],
        NETWORK_CODES[options.network],
        ACTIVATION_CODES[options.activation],
        options.activation_constant,
        LOG_SCALE_CODES[options.log_scale],
        options.constant,
        [] if options.spline is None else options.spline.prepared().numbers(),
        options.context_layer,
        options.inverse,
    )


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------

if not CPP.missing:
    BYTES = 2 * torch.ops.glf_fast.cpu_vector_bytes()  # of the rows of a panel, which are saved together

    @torch.library.register_fake("glf_fast::cpu_autoregressive_flow")
    def _(
        x: Tensor, matrix: Tensor, offset: Tensor, weights: list[Tensor], biases: list[Tensor], fan_in: Tensor,
        context: Tensor | None, transform: int, network: int, activation: int, activation_constant: float,
        log_scale: int, constant: float, spline: list[float], context_layer: bool, inverse: bool, density: bool,
        save: int, units: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        check_fake(x)
        rows = BYTES // x.itemsize
        saved = x.new_empty(0)
        if save:
            saved = x.new_empty(len(matrix), (x.shape[0] + rows - 1) // rows, units, rows)
        return torch.empty_like(x), x.new_empty(x.shape[0]), saved

    @torch.library.register_fake("glf_fast::cpu_autoregressive_flow_backward")
    def _(
        grad_out: Tensor | None, grad_logdet: Tensor, out: Tensor, saved: Tensor, matrix: Tensor, offset: Tensor,
        weights: list[Tensor], biases: list[Tensor], fan_in: Tensor, context: Tensor | None, transform: int, network: int,
        activation: int, activation_constant: float, log_scale: int, constant: float, spline: list[float],
        context_layer: bool, inverse: bool, save: int,
        parameters: bool, of_context: bool,
    ) -> list[Tensor]:  # fmt: skip
        grad_context = out.new_empty(0) if context is None or not of_context else torch.empty_like(context)
        grads = [torch.empty_like(out), grad_context]
        return grads + [torch.empty_like(t) for t in (matrix, offset, *weights, *biases) if parameters]
