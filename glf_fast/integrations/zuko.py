"""The interface of zuko's flows: `flow(c)` is a distribution. Needs no zuko."""

from __future__ import annotations

from torch import Tensor, nn

import glf_fast.flow
from glf_fast.flow.distribution import FlowDistribution

__all__ = ["Flow"]


class Flow(nn.Module):
    """A flow of ours that is called as zuko's: `flow(c).log_prob(x)`, `flow().sample((n,))`, `flow(c).rsample_and_log_prob()`.

    Args:
        flow: the flow.
    """

    def __init__(self, flow: glf_fast.flow.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, c: Tensor | None = None) -> FlowDistribution:
        """p(x | c), with one distribution for each row of c (*batch_shape, C)."""
        return self.flow.distribution(c)
