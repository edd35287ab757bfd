"""zuko's flows, converted: couplings of every mask, kind and slope, linear layers, hybrids, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import zuko
from torch import nn
from zuko.distributions import DiagNormal
from zuko.flows import BPF, MAF, NICE, GeneralCouplingTransform, RealNVP
from zuko.lazy import Flow, LazyInverse, UnconditionalDistribution, UnconditionalTransform
from zuko.transforms import (
    AdditiveTransform,
    LULinearTransform,
    MonotonicAffineTransform,
    PermutationTransform,
    RotationTransform,
)

from glf_fast import CouplingFlow
from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.padded import Padded
from glf_fast.conversion.zuko import LIBRARY


@pytest.fixture
def library(tools):
    def inverse(flow, z, context):
        base = flow.base(None).base_dist
        return flow.transform(context).inv(base.loc + z * base.scale)

    return tools.Library(LIBRARY, lambda flow, x, context: flow(context).log_prob(x), inverse)


def standard(dim: int, buffer: bool = True) -> UnconditionalDistribution:
    return UnconditionalDistribution(DiagNormal, torch.zeros(dim), torch.ones(dim), buffer=buffer)


def couplings(dim: int, context: int, n: int = 3, **options) -> list[GeneralCouplingTransform]:
    return [
        GeneralCouplingTransform(dim, context, torch.randperm(dim) < 1 + k % (dim - 1), **options) for k in range(n)
    ]


def linear_layers(dim: int) -> list[UnconditionalTransform]:
    near_one = torch.eye(dim) + 0.1 * torch.randn(dim, dim)
    return [
        UnconditionalTransform(LULinearTransform, near_one),
        UnconditionalTransform(RotationTransform, torch.randn(dim, dim), buffer=True),
        UnconditionalTransform(PermutationTransform, torch.randperm(dim), buffer=True),
        UnconditionalTransform(
            torch.distributions.AffineTransform, loc=torch.randn(dim), scale=torch.rand(dim) + 0.5, buffer=True
        ),
    ]


def additive_maf(dim: int, context: int) -> nn.Module:
    """A layer that stays as it is, and whose inverse is exact."""
    return MAF(dim, context, transforms=1, univariate=AdditiveTransform, shapes=((),)).transform


def mixed(dim: int, context: int) -> list:
    return [t for pair in zip(couplings(dim, context, 4), linear_layers(dim), strict=True) for t in pair]


# name → (D, C) → flow; steps of each CouplingFlow, and what is kept between them
CASES: dict[str, tuple[Callable[[int, int], nn.Module], str]] = {
    "RealNVP": (lambda d, c: RealNVP(d, c, transforms=4), "4"),
    "NICE-randmask": (lambda d, c: NICE(d, c, transforms=4, randmask=True, hidden_features=(9, 17)), "4"),
    "deep-elu": (lambda d, c: RealNVP(d, c, transforms=2, activation=nn.ELU, hidden_features=(5, 6, 7, 8)), "2"),
    "elu of another α": (lambda d, c: RealNVP(d, c, transforms=2, activation=partial(nn.ELU, alpha=0.5)), "2"),
    "hardswish": (lambda d, c: RealNVP(d, c, transforms=2, activation=nn.Hardswish), "2"),
    "no hidden layer": (lambda d, c: RealNVP(d, c, transforms=2, hidden_features=()), "2"),
    "six hidden layers": (lambda d, c: RealNVP(d, c, transforms=2, hidden_features=(9,) * 6), "2"),
    "masks": (lambda d, c: Flow(couplings(d, c, 5), standard(d)), "5"),
    "slope": (
        lambda d, c: Flow(couplings(d, c, univariate=partial(MonotonicAffineTransform, slope=1e-5)), standard(d)),
        "3",
    ),
    "additive": (lambda d, c: Flow(couplings(d, c, univariate=AdditiveTransform, shapes=((),)), standard(d)), "3"),
    "linear": (lambda d, c: Flow(mixed(d, c), standard(d)), "4"),
    "trained-base": (lambda d, c: Flow(couplings(d, c), standard(d, buffer=False)), "3"),
    "inverse": (lambda d, c: Flow([LazyInverse(t) for t in couplings(d, c)] + linear_layers(d)[:1], standard(d)), "3"),
    "hybrid": (
        lambda d, c: Flow([*couplings(d, c, 2), additive_maf(d, c), *couplings(d, c, 2)], standard(d)),
        "2 KeptTransform 2",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dim", "context"), [(2, 0), (5, 2), (6, 1)])
def test_every_class(library, tools, name: str, dim: int, context: int) -> None:
    make, outline = CASES[name]
    tools.prove(library, tools.shake(make(dim, context), 0.1), dim, context, outline)


def test_float32_is_at_least_as_close_to_the_truth(library, tools) -> None:
    tools.as_close(library, [tools.shake(make(5, 2), 0.1) for make, _ in CASES.values()], (5,), (2,))


def test_alternating_masks_become_one_launch() -> None:
    flow = convert(RealNVP(6, 2, transforms=8))
    stacked = [m for m in flow.modules() if isinstance(m, CouplingFlow)]
    assert [m.config["steps"] for m in stacked] == [8]
    assert stacked[0].config["linear"] == "permutation" and not stacked[0].config["actnorm"] and not stacked[0].held
    odd = convert(RealNVP(5, 2, transforms=8))
    assert isinstance(odd, Padded) and odd.flow.config["dim"] == 6


def test_the_slope_comes_from_the_object() -> None:
    """Its default was 1e-3, then 1e-4, then 1e-3 again; a state_dict knows nothing of it."""
    for slope in (1e-3, 1e-4, 0.2):
        transforms = couplings(4, 0, univariate=partial(MonotonicAffineTransform, slope=slope))
        flow = convert(Flow(transforms, standard(4)))
        (stacked,) = [m for m in flow.modules() if isinstance(m, CouplingFlow)]
        assert stacked.config["log_scale_constant"] == slope


def test_a_trained_checkpoint_of_the_library(library, tools) -> None:
    x, context = torch.randn(512, 3).cumsum(1), torch.randn(512, 2)
    make = partial(RealNVP, 3, 2, transforms=3, hidden_features=(32, 32))
    tools.prove(library, tools.trained(library, make, x, context), 3, 2, "3")


def test_frozen_parts_stay_frozen(library, tools) -> None:
    flow = tools.shake(Flow(mixed(5, 1), standard(5)), 0.1)
    first, second = [t for t in flow.transform.transforms if isinstance(t, GeneralCouplingTransform)][:2]
    first.requires_grad_(False)
    second.hyper[0].requires_grad_(False)
    converted = tools.prove(library, flow, 5, 1)
    frozen = convert(flow.requires_grad_(False))
    assert any(p.requires_grad for p in converted.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())


def test_what_stays_as_it_is_says_why(library, tools) -> None:
    """Trained rotations, normalizing networks and tied networks are kept within a hybrid."""
    rotation = UnconditionalTransform(RotationTransform, torch.randn(4, 4))
    normalized = GeneralCouplingTransform(4, 0, normalize=True)
    tied = couplings(4, 0, 2)
    tied[1].hyper = tied[0].hyper
    tied[1].mask = tied[0].mask.clone()
    flow = tools.shake(Flow([*couplings(4, 0), rotation, normalized, *tied], standard(4)), 0.1)
    converted = tools.prove(library, flow, 4, outline="3" + 4 * " KeptTransform")
    a, b = converted.layers[-2:]
    assert a.transform.hyper is b.transform.hyper, "tied before, tied after"


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (
            lambda: BPF(3, transforms=2),
            "no coupling or autoregressive layer that can be fused.*transformation BoundedBernsteinTransform is neither",
        ),
        (lambda: RealNVP(3, hidden_features=(4,) * 9), "9 hidden layers; zero to eight"),
        (lambda: RealNVP(3, activation=nn.CELU), "CELU.* is neither a linear layer nor one of the activations"),
        (lambda: RealNVP(3, activation=partial(nn.ELU, alpha=-0.5)), "elu with alpha -0.5"),
        (
            lambda: Flow(
                couplings(3, 0), UnconditionalDistribution(zuko.distributions.BoxUniform, -torch.ones(3), torch.ones(3))
            ),
            "base distribution BoxUniform",
        ),
        (lambda: nn.Linear(2, 2), "Linear is no flow of normflows, nflows, zuko, pyro or FrEIA"),
    ],
)
def test_refusals_name_layer_and_reason(flow, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(flow())
