"""The reference as a function of a call: where no kernels take it, and for what kernels do not differentiate."""

from __future__ import annotations

from torch import Tensor

from glf_fast import reference
from glf_fast.ops.coupling_flow.call import Call

__all__ = ["run"]


def run(call: Call) -> tuple[Tensor, ...]:
    """Output and logdet, or the density alone."""
    x, context, maps, weights, biases, options, seed = call
    if options.members > 1:
        return call.by_members(run)
    keywords = options.keywords() | {"seed": seed}
    if options.plu:
        return (reference.plu_flow_log_prob(x, maps, weights, biases, context, **keywords),)
    if options.density:
        A, c, logabsdet = maps
        return (reference.coupling_flow_log_prob(x, A, c, logabsdet, weights, biases, context, **keywords),)
    flow = reference.coupling_flow_inverse if options.inverse else reference.coupling_flow
    return flow(x, maps.matrix, maps.offset, weights, biases, context, **keywords)
