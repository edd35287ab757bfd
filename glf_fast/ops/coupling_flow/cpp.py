"""The whole coupling flow on a processor (csrc/cpu): a pass crosses into C++ once."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.backends import CPP
from glf_fast.ops.checks import check_fake
from glf_fast.ops.codes import ACTIVATION_CODES, COUPLING_CODES, LOG_SCALE_CODES, NETWORK_CODES
from glf_fast.ops.coupling_flow.call import Call, CallOptions
from glf_fast.reference import COUPLINGS, NEED_INPUT, layers_of_block

__all__ = ["BACKENDS", "MAX_LAYERS", "adapt", "backward", "forward", "refuses"]

BACKENDS = (CPP,)
MAX_LAYERS = 17  # of a network: a residual one of five blocks with gates
# What the forward keeps (csrc/cpu/flow.h, Save).
NOTHING, INPUTS, RECORDS = 0, 1, 2
# Bytes of hidden layers that are kept. That saves the backward a third of its arithmetic, as long as they stay in the
# last-level cache. Of wide layers the arithmetic costs more than the way to memory and back: a training pass that keeps 90 MB
# or more takes 1.7 times as long as one that computes them again with 64 hidden units, 1.3 times with 128, equally long with
# 256, and 0.75 times with 512 and 1,024 (Zen 3, two threads).
RECORDS_LIMIT = 32 << 20
WIDE, OF_WIDE = 512, 8  # units of the first hidden layer, and how many times as much is kept then
operations = torch.ops.glf_fast


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call; "" where they can."""
    options = call.options
    if len(call.weights) > MAX_LAYERS:
        return f"a network of more than {MAX_LAYERS} layers"
    if not (
        options.coupling in COUPLING_CODES
        and options.network in NETWORK_CODES
        and options.activation in ACTIVATION_CODES
        and options.log_scale in LOG_SCALE_CODES
    ):
        return "csrc has no such coupling, network, activation or log-scale"
    return ""


def adapt(call: Call) -> Call:
    """The call as it is: networks of every kind are the kernels' own, and their precision is the state's."""
    return call


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logdet, which is the density if options.density, and with `keep` what the backward starts from."""
    x, context, (matrix, offset, logabsdet), weights, biases, options, seed = call
    save, record = NOTHING, 0
    if keep:
        save, record = RECORDS, record_width(call)
        wide = len(weights) > 1 and weights[0].shape[-1] >= WIDE
        limit = RECORDS_LIMIT * OF_WIDE if wide else RECORDS_LIMIT
        if len(matrix) // options.members * len(x) * record * x.itemsize > limit:
            save, record = INPUTS, x.shape[1]
    return operations.cpu_coupling_flow.default(
        x, matrix, offset, weights, biases, context, *_numbers(options), options.density, save, record, options.members,
        options.row_scales, options.dropout, seed, logabsdet,
    )  # fmt: skip


def backward(
    call: Call, state: Tensor, saved: Tensor, unmatrix: Tensor | None, grad_out: Tensor | None, grad_logdet: Tensor,
    parameters: bool, of_context: bool, of_matrix: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients that `FlowKernels.backward` lists; ∂context is made even if not `of_context`."""
    x, context, (matrix, offset, _), weights, biases, options, seed = call
    save = NOTHING if unmatrix is not None else INPUTS if saved.shape[-1] == x.shape[1] else RECORDS
    return operations.cpu_coupling_flow_backward.default(
        grad_out, grad_logdet, state, saved, matrix, unmatrix, offset, weights, biases, context, *_numbers(options), save,
        parameters, options.members, of_matrix, options.row_scales, options.dropout, seed,
    )  # fmt: skip


def record_width(call: Call) -> int:
    """Numbers that RECORDS keeps of a row and step: as csrc/cpu/record.h lays them out, which checks it."""
    x, context, _, weights, _, options, _ = call
    line = 64 // x.itemsize
    networks = COUPLINGS[options.coupling].networks
    argument = options.activation in NEED_INPUT  # which is kept besides the value
    dim, context_dim = x.shape[1], 0 if context is None else context.shape[1]
    padded = [dim, dim, *([dim - dim // 2 + context_dim] if context_dim else []), networks * weights[-1].shape[-1]]
    if options.network == "residual":
        blocks, gated = (len(weights) - 2) // layers_of_block(context), context_dim > 0
        # h, a(h), the two of the activation inside, the branch and the gate: of each block, or in one place for all
        fields = (1 + blocks * argument) + blocks + (1 + argument) * blocks + (2 * blocks if gated else min(blocks, 1))
        hidden = fields * -(-weights[0].shape[-1] // line)
    else:
        hidden = (1 + argument) * networks * sum(-(-w.shape[-1] // line) for w in weights[:-1])
    lines = sum(-(-n // line) + 1 for n in padded) + hidden
    return line * (lines | 1)


def _numbers(options: CallOptions) -> tuple[int, int, int, float, int, float, bool, list[float], bool]:
    """coupling, network, activation and its constant, log_scale and its constant, add_first, spline, inverse."""
    return (
        COUPLING_CODES[options.coupling],
        NETWORK_CODES[options.network],
        ACTIVATION_CODES[options.activation],
        options.activation_constant,
        LOG_SCALE_CODES[options.log_scale],
        options.constant,
        options.add_first,
        [] if options.spline is None else options.spline.prepared().numbers(),
        options.inverse,
    )


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------

if not CPP.missing:

    @torch.library.register_fake("glf_fast::cpu_coupling_flow")
    def _(
        x: Tensor, matrix: Tensor, offset: Tensor, weights: list[Tensor], biases: list[Tensor], context: Tensor | None,
        coupling: int, network: int, activation: int, activation_constant: float, log_scale: int, constant: float,
        add_first: bool, spline: list[float], inverse: bool, density: bool, save: int, record: int, members: int = 1,
        row_scales: bool = False, dropout: float = 0.0, seed: Tensor | None = None, logabsdet: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        check_fake(x)
        saved = x.new_empty(0) if save == 0 else x.new_empty(len(matrix) // members, x.shape[0], record)
        return torch.empty_like(x), x.new_empty(x.shape[0]), saved

    @torch.library.register_fake("glf_fast::cpu_coupling_flow_backward")
    def _(
        grad_out: Tensor | None, grad_logdet: Tensor, out: Tensor, saved: Tensor, matrix: Tensor,
        unmatrix: Tensor | None, offset: Tensor, weights: list[Tensor], biases: list[Tensor], context: Tensor | None,
        coupling: int, network: int, activation: int, activation_constant: float, log_scale: int, constant: float,
        add_first: bool, spline: list[float], inverse: bool, save: int, parameters: bool, members: int = 1,
        of_matrix: bool = True, row_scales: bool = False,
        dropout: float = 0.0, seed: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        grads = [torch.empty_like(out), out.new_empty(0) if context is None else torch.empty_like(context)]
        if not parameters:
            return grads
        grads.append(torch.empty_like(matrix) if of_matrix else out.new_empty(0))
        grads.append(torch.empty_like(offset))
        if grad_out is None:
            grads.append(out.new_empty(len(matrix)))
        return grads + [torch.empty_like(t) for t in (*weights, *biases)]
