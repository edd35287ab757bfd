"""zuko's masked autoregressive flows, converted: every number of passes, order, adjacency matrix and transformation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import zuko
from torch import nn
from zuko.distributions import DiagNormal
from zuko.flows import MAF, NCSF, NSF, MaskedAutoregressiveTransform, RealNVP
from zuko.lazy import Flow, LazyInverse, UnconditionalDistribution
from zuko.transforms import AdditiveTransform, MonotonicAffineTransform

import glf_fast
from glf_fast import AutoregressiveFlow, accelerate
from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.zuko import LIBRARY


@pytest.fixture
def library(tools):
    return tools.Library(
        LIBRARY, lambda flow, x, context: flow(context).log_prob(x), lambda flow, z, c: flow.transform(c).inv(z)
    )


def flow_of(dim: int, *transforms: nn.Module) -> Flow:
    base = UnconditionalDistribution(DiagNormal, torch.zeros(dim), torch.ones(dim), buffer=True)
    return Flow(list(transforms), base)


def graph(dim: int, context: int = 0) -> torch.Tensor:
    """A random adjacency matrix of a graph without cycles, in which some feature depends on another."""
    order = torch.randperm(dim)
    edges = (order[:, None] > order) & (torch.rand(dim, dim) < 0.6)
    edges[order.argsort()[1], order.argsort()[0]] = True
    return torch.cat([edges | torch.eye(dim, dtype=torch.bool), torch.rand(dim, context) < 0.7], 1)


def graphs(dim: int, context: int, of_context: int = 0) -> Flow:
    layers = [MaskedAutoregressiveTransform(dim, context, adjacency=graph(dim, of_context)) for _ in range(2)]
    return flow_of(dim, *layers)


# name → (D, C) → flow; steps of each AutoregressiveFlow behind an "a", of each CouplingFlow
CASES: dict[str, tuple[Callable[[int, int], nn.Module], str]] = {
    "MAF": (MAF, "a3"),
    "NSF": (partial(NSF, transforms=2, bins=5, slope=1e-2), "a2"),
    "two passes": (partial(MAF, transforms=2, passes=2), "a2"),
    "two passes of splines": (partial(NSF, transforms=2, passes=2, hidden_features=(9, 17)), "a2"),
    "three passes, random orders": (partial(MAF, passes=3, randperm=True, activation=nn.ELU), "a3"),
    "graphs": (graphs, "a2"),
    "graphs of the context, too": (lambda d, c: graphs(d, c, c), "a2"),
    "slope, four layers": (
        partial(MAF, univariate=partial(MonotonicAffineTransform, slope=1e-5), hidden_features=(5, 6, 7, 8)),
        "a3",
    ),
    "inverse, and a coupling": (
        lambda d, c: flow_of(
            d, *map(LazyInverse, MAF(d, c, transforms=2).transform.transforms), RealNVP(d, c, transforms=1).transform
        ),
        "a2 1",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dim", "context"), [(2, 0), (5, 2), (6, 3)])
def test_every_kind(library, tools, name: str, dim: int, context: int) -> None:
    make, outline = CASES[name]
    tools.prove(library, tools.shake(make(dim, context), 0.1), dim, context, outline)
