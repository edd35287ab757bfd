"""The interface of zuko's flows: `flow(c)` is a distribution. Needs no zuko."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, Transform

import glf_fast.flow
from glf_fast.flow.distribution import FlowDistribution, FlowTransform

__all__ = ["Flow", "NormalizingFlow"]


class NormalizingFlow(FlowDistribution):
    """The distribution p(x | c) with the attributes of zuko's `flow(c)`: `transform` and `base`."""

    @property
    def transform(self) -> Transform:
        """The map from data to noise: `flow(c).transform(x)`; its `.inv` maps noise to data."""
        return FlowTransform(self.flow, self.context).inv

    @property
    def base(self) -> Independent:
        """N(0, I) with the shapes of this distribution."""
        like = next(self.flow.parameters(), torch.empty(0))
        zeros = torch.zeros(self.batch_shape + self.event_shape, device=like.device, dtype=like.dtype)
        return Independent(Normal(zeros, torch.ones_like(zeros)), len(self.event_shape))


class Flow(nn.Module):
    """A flow of glf_fast with zuko's interface: `flow(c).log_prob(x)`, `flow().sample((n,))`, `flow(c).transform(x)`.

    Args:
        flow: the flow.
    """

    def __init__(self, flow: glf_fast.flow.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, c: Tensor | None = None) -> NormalizingFlow:
        """p(x | c), with one distribution for each row of c (*batch_shape, C)."""
        return NormalizingFlow(self.flow, c)

    def transform(self, c: Tensor | None = None) -> Transform:
        """The map from data to noise given c, as `flow(c).transform`."""
        return self(c).transform

    def base(self, c: Tensor | None = None) -> Independent:
        """N(0, I), as `flow(c).base`."""
        return self(c).base
