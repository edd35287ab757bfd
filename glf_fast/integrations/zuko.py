"""The interface of zuko's flows: `flow(c)` is a distribution. Needs no zuko."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, Transform

import glf_fast.flow
from glf_fast.flow import FlowDistribution, FlowTransform

__all__ = ["Flow", "Given"]


class Flow(nn.Module):
    """A flow of ours that is called as zuko's: `flow(c).log_prob(x)`, `flow().sample((n,))`, `flow(c).rsample_and_log_prob()`.

    Args:
        flow: the flow.
    """

    def __init__(self, flow: glf_fast.flow.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, c: Tensor | None = None) -> Given:
        """p(x | c), with one distribution for each row of c (*batch_shape, C)."""
        return Given(self.flow, c)


class Given(FlowDistribution):
    """p(x | c) with the two attributes of zuko's: `transform`, data → noise, and `base`."""

    @property
    def transform(self) -> Transform:
        """Data (*batch_shape, *event_shape) → noise."""
        return FlowTransform(self.flow, self.context).inv

    @property
    def base(self) -> Independent:
        """N(0, I) of the noise."""
        like = next(self.flow.parameters())
        zero = torch.zeros(self.event_shape, dtype=like.dtype, device=like.device)
        return Independent(Normal(zero, torch.ones_like(zero)), len(self.event_shape))
