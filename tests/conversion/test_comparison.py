"""Flows that are hard to compare: steep, in half precision, on bounded domains, far from 0, of unequal widths."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
import zuko
from library_flows import shake
from nflows import transforms as T
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows_couplings import alternating
from torch import nn

import glf_fast
from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.accelerate import accelerate


def masked(dim: int, n: int, hidden: int = 64) -> nf.NormalizingFlow:
    net = lambda: nf.nets.MLP([dim, hidden, hidden, dim])  # noqa: E731
    layers = [nf.flows.MaskedAffineFlow(((torch.arange(dim) + k) % 2).float(), net(), net()) for k in range(n)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), layers)


def block(widths: tuple[int, ...] = (16,)) -> nn.Module:
    return nf.flows.AffineCouplingBlock(nf.nets.MLP([3, *widths, 6]))


@pytest.mark.parametrize(("seed", "std"), [(0, 0.15), (2, 0.15), (12, 0.15), (21, 0.2), (28, 0.2)])
def test_steep_flows_convert(seed: int, std: float) -> None:
    """Where N(0, 9) overflows, and the way back from N(0, 1) too."""
    torch.manual_seed(seed)
    flow = shake(masked(5, 8), std)
    converted = convert(flow)
    x = 0.05 * torch.randn(8, 5)
    torch.testing.assert_close(converted.log_prob(x), flow.log_prob(x), rtol=1e-3, atol=1e-2)
    assert accelerate(flow)


def test_flows_trained_long_convert() -> None:
    """Unbounded scales explode off the data: nothing is misread where the library itself is not finite on its way back."""
    torch.manual_seed(0)
    flow = masked(16, 8, 32)
    data = torch.randn(512, 4) @ torch.randn(4, 16) + 0.03 * torch.randn(512, 16)  # nearly on a plane
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        flow.forward_kld(data).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10)
        optimizer.step()
    converted = convert(flow)
    torch.testing.assert_close(converted.log_prob(data), flow.log_prob(data), rtol=1e-3, atol=1e-2)


def test_bounded_domains_are_compared_on_samples() -> None:
    torch.manual_seed(0)
    flow = Flow(T.CompositeTransform([T.Logit(), *alternating(4)]), StandardNormal([4]))
    converted = convert(flow)
    x = torch.rand(6, 4)
    torch.testing.assert_close(converted.log_prob(x), flow.log_prob(x), rtol=1e-4, atol=1e-4)
    base = zuko.flows.RealNVP(4, transforms=2)
    inverse = zuko.lazy.UnconditionalTransform(torch.distributions.SigmoidTransform)
    bounded = zuko.lazy.Flow(zuko.lazy.LazyComposedTransform(zuko.lazy.LazyInverse(inverse), base.transform), base.base)
    torch.testing.assert_close(convert(bounded).log_prob(x), bounded().log_prob(x), rtol=1e-4, atol=1e-4)


def test_what_is_random_is_refused_with_that_reason() -> None:
    base = zuko.flows.RealNVP(4, transforms=2)
    flow = zuko.lazy.Flow(
        [*base.transform.transforms, zuko.flows.FFJTransform(4, exact=False, hidden_features=(8,))], base.base
    )
    with pytest.raises(ConversionError, match="original flow is not reproducible"):
        convert(flow)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: T.CompositeTransform([T.LULinear(3)]),
            "CompositeTransform of nflows is not a flow.*takes a nflows.Flow",
        ),
        (
            lambda: zuko.flows.GeneralCouplingTransform(4),
            "GeneralCouplingTransform of zuko is not a flow.*takes a zuko.Flow",
        ),
        (lambda: block(), "AffineCouplingBlock of normflows is not a flow"),
        (lambda: nf.ClassCondFlow(nf.distributions.DiagGaussian(4), []), "ClassCondFlow of normflows is not a flow"),
        (lambda: zuko.mixtures.GMM(4), "GMM of zuko is not a flow"),
    ],
)
def test_what_is_no_flow_is_refused(make, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(make())


def test_subclasses_convert() -> None:
    class Mine(nf.NormalizingFlow):
        pass

    assert convert(Mine(nf.distributions.DiagGaussian(6), [block(), block()])).event_shape == (6,)
    assert glf_fast.ConversionError is ConversionError and {"convert", "accelerate"} <= set(dir(glf_fast))
