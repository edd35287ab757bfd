"""zuko's masked autoregressive flows, converted: every number of passes, order, adjacency matrix and transformation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from zuko.distributions import DiagNormal
from zuko.flows import MAF, NCSF, NSF, ElementWiseTransform, MaskedAutoregressiveTransform, RealNVP
from zuko.lazy import Flow, LazyInverse, UnconditionalDistribution
from zuko.transforms import AdditiveTransform, MonotonicAffineTransform

from glf_fast import accelerate
from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.layers import Kept
from glf_fast.conversion.reading import read_flow
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
    "no hidden layer": (partial(MAF, hidden_features=()), "a3"),
    "no hidden layer, two passes of splines": (partial(NSF, transforms=2, passes=2, hidden_features=()), "a2"),
    "six layers, mish": (partial(MAF, transforms=2, hidden_features=(6,) * 6, activation=nn.Mish), "a2"),
    "another α": (partial(MAF, transforms=2, activation=partial(nn.ELU, 0.5)), "a2"),
    "graphs": (graphs, "a2"),
    "graphs of the context, too": (lambda d, c: graphs(d, c, c), "a2"),
    "slope, four layers": (
        partial(MAF, univariate=partial(MonotonicAffineTransform, slope=1e-5), hidden_features=(5, 6, 7, 8)),
        "a3",
    ),
    "residual": (partial(NSF, transforms=2, residual=True, hidden_features=(16, 16, 16)), "a2"),  # pocoMC's
    "residual, two passes": (partial(MAF, transforms=2, residual=True, passes=2, hidden_features=(7,)), "a2"),
    "inverse, and a coupling": (
        lambda d, c: flow_of(
            d, *map(LazyInverse, MAF(d, c, transforms=2).transform.transforms), RealNVP(d, c, transforms=1).transform
        ),
        "a2 1",
    ),
}


# Some seconds of processor time each: what a user does with a flow, and float32. The others are compared in float64.
WHOLE = ("MAF", "graphs", "residual", "inverse, and a coupling")


@pytest.mark.parametrize("name", CASES)
def test_every_kind(library, tools, name: str) -> None:
    make, outline = CASES[name]
    if name in WHOLE:
        tools.prove(library, tools.shake(make(4, 2), 0.1), 4, 2, outline)
    for dim, context in ((2, 0), (5, 2), (7, 3)):
        same_map(library, tools, tools.shake(make(dim, context), 0.1).double(), dim, context)


def same_map(library, tools, flow: nn.Module, dim: int, context: int) -> None:
    """The same in float64, and nothing of it is the original's."""
    assert not any(isinstance(layer, Kept) for layer in read_flow(LIBRARY, flow).layers)
    given = torch.randn(32, context, dtype=torch.float64) if context else None
    tools.same_map(library, flow, torch.randn(32, dim, dtype=torch.float64), given)


def test_float32_is_at_least_as_close_to_the_truth(library, tools) -> None:
    tools.as_close(library, [tools.shake(CASES[name][0](5, 2), 0.1) for name in list(CASES)[::3]], (5,), (2,))


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes(library, tools, seed: int) -> None:
    """Sizes, orders, passes, depths, activations and frozen layers, drawn."""
    torch.manual_seed(seed)
    dim, context = int(torch.randint(2, 8, ())), int(torch.randint(0, 3, ()))
    passes, depth, activation = (int(torch.randint(*ends, ())) for ends in ((2, dim + 1), (1, 5), (0, 3)))
    make = (MAF, NSF)[seed % 2]
    hidden = tuple(torch.randint(3, 20, (depth,)).tolist())
    flow = make(
        dim, context, transforms=2, passes=passes, randperm=True, hidden_features=hidden[:1] * depth if seed > 3 else hidden,
        activation=(nn.ReLU, nn.SiLU, nn.Tanh)[activation], residual=seed > 3,
    )  # fmt: skip
    tools.shake(flow, 0.1).transform.transforms[0].hyper[0].requires_grad_(False)
    same_map(library, tools, flow.double(), dim, context)


def test_training_goes_on_as_before() -> None:
    """accelerate: SGD and Adam take the same steps as with the original."""
    torch.manual_seed(0)
    x, context = torch.randn(64, 5, dtype=torch.float64), torch.randn(64, 2, dtype=torch.float64)
    for optimizer, rate in ((torch.optim.SGD, 0.05), (torch.optim.Adam, 0.01)):
        losses = []
        for fast in (False, True):
            torch.manual_seed(1)
            flow = NSF(5, 2, transforms=2, passes=3, residual=True, hidden_features=(16, 16)).double()
            if fast:
                (replaced,) = accelerate(flow).replaced
                assert replaced.into["AutoregressiveFlow"] == replaced.flows == 1
            steps, own = optimizer(flow.parameters(), rate), []
            for _ in range(8):
                steps.zero_grad()
                loss = -flow(context).log_prob(x).mean()
                loss.backward()
                steps.step()
                own.append(loss.item())
            losses.append(own)
        assert losses[1] == pytest.approx(losses[0], abs=1e-8)
        assert losses[0][-1] < losses[0][0] - 0.03


def test_what_stays_as_it_is_says_why() -> None:
    def reason(flow: nn.Module) -> str:
        with pytest.raises(ConversionError) as error:
            convert(flow)
        return str(error.value)

    assert "AdditiveTransform is covered in couplings alone" in reason(
        MAF(3, univariate=AdditiveTransform, shapes=[()])
    )
    assert "layers of several widths" in reason(MAF(3, residual=True, hidden_features=(8, 9)))
    assert "the activation CELU" in reason(MAF(3, activation=nn.CELU))
    assert "9 hidden layers; zero to eight" in reason(MAF(3, hidden_features=(4,) * 9))
    assert "base distribution BoxUniform" in reason(NCSF(3))
    report = accelerate(NCSF(3))
    assert not report.replaced and "CircularRQSTransform" in report.left[0].reason


@pytest.mark.parametrize(("dim", "kind"), [(1, MAF), (1, RealNVP), (1, NSF), (3, None)])
def test_features_that_depend_on_the_context_alone(library, tools, dim: int, kind) -> None:
    """The transforms of every flow of zuko of one feature."""
    options = {"hidden_features": (9, 8), "activation": nn.Tanh}
    if kind is None:
        flow = flow_of(dim, *(ElementWiseTransform(dim, 2, **options) for _ in range(2)))
    else:
        flow = kind(dim, 2, transforms=2, **options)
    converted = tools.prove(library, tools.shake(flow), dim, 2, "a2")
    other = copy.deepcopy(flow)
    assert accelerate(other)
    x, c = torch.randn(5, dim), torch.randn(5, 2)
    torch.testing.assert_close(other(c).log_prob(x), flow(c).log_prob(x))
    torch.testing.assert_close(converted.log_prob(x, c), flow(c).log_prob(x))


def test_features_that_depend_on_nothing_stay() -> None:
    report = accelerate(RealNVP(1, transforms=2))
    assert not report and "depends on nothing" in str(report)
