"""zuko: flows by name, from couplings over masks."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from bench.cases import FlowCase
from bench.libraries.density import Density, Library

__all__ = ["ZUKO"]


def _density(name: str, case: FlowCase, device: str = "cpu") -> Density:
    """Couplings alone, with masks that alternate."""
    import zuko

    kind = getattr(zuko.flows, name)
    flow = kind(case.dim, case.context_dim, transforms=case.steps, hidden_features=case.hidden)

    def sample(n: int, context: Tensor | None) -> Tensor:
        return flow().sample((n,)) if context is None else flow(context).sample()

    return Density(flow, lambda x, c: flow(c).log_prob(x), sample)


ZUKO = Library(
    "zuko",
    partial(_density, "RealNVP"),
    {"RealNVP": partial(_density, "RealNVP"), "NICE": partial(_density, "NICE")},
)
