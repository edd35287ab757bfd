"""zuko: flows by name, from couplings over masks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from bench.cases import FlowCase
from bench.libraries.density import Density, Library

__all__ = ["ZUKO"]


def _density(name: str, case: FlowCase, device: str = "cpu", **options: Any) -> Density:
    """Couplings alone, with masks that alternate."""
    import zuko

    kind = getattr(zuko.flows, name)
    flow = kind(case.dim, case.context_dim, transforms=case.steps, hidden_features=case.hidden, **options)

    def sample(n: int, context: Tensor | None) -> Tensor:
        return flow().sample((n,)) if context is None else flow(context).sample()

    return Density(flow, lambda x, c: flow(c).log_prob(x), sample)


def _flow(case: FlowCase, device: str) -> Density:
    """Splines are in RealNVP's place of affine functions.

    NSF(passes=2) is a coupling, too, but as masks of an autoregressive network, which makes the parameters of both halves: it
    is 1.8 times as large.
    """
    import zuko

    K = case.bins
    splines = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(K,), (K,), (K - 1,)]}
    return _density("RealNVP", case, device, **(splines if K else {}))


ZUKO = Library(
    "zuko",
    _flow,
    {"RealNVP": partial(_density, "RealNVP"), "NICE": partial(_density, "NICE")},
)
