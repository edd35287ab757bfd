"""The reference as a function of a call: where no kernels take it, and for what kernels do not differentiate."""

from __future__ import annotations

from torch import Tensor

from glf_fast import reference
from glf_fast.ops.autoregressive_flow.call import Call

__all__ = ["run"]


def run(call: Call) -> tuple[Tensor, ...]:
    """Output and logdet, or the density alone."""
    x, context, matrix, offset, logabsdet, fan_in, weights, biases, options = call
    keywords = options.keywords()
    if options.density:
        assert logabsdet is not None
        return (
            reference.autoregressive_flow_log_prob(
                x, matrix, offset, logabsdet, weights, biases, fan_in, context, **keywords
            ),
        )
    flow = reference.autoregressive_flow_inverse if options.inverse else reference.autoregressive_flow
    return flow(x, matrix, offset, weights, biases, fan_in, context, **keywords)
