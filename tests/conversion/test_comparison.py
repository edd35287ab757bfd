"""Flows that are hard to compare: steep, in half precision, on bounded domains, far from 0, of unequal widths."""

from __future__ import annotations

import copy

import normflows as nf
import pytest
import torch
import zuko
from nflows import transforms as T
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch import nn

import glf_fast
from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.accelerate import accelerate
from glf_fast.flow import ActNorm, CouplingFlow


def masked(dim: int, n: int, hidden: int = 64) -> nf.NormalizingFlow:
    net = lambda: nf.nets.MLP([dim, hidden, hidden, dim])  # noqa: E731
    layers = [nf.flows.MaskedAffineFlow(((torch.arange(dim) + k) % 2).float(), net(), net()) for k in range(n)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), layers)


def block(widths: tuple[int, ...] = (16,)) -> nn.Module:
    return nf.flows.AffineCouplingBlock(nf.nets.MLP([3, *widths, 6]))


class Net(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.net = nf.nets.MLP([n_in, 8, n_out])

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.net(x)


def alternating() -> list[nn.Module]:
    return [T.AffineCouplingTransform(s * torch.tensor([1, -1, 1, -1]), Net) for s in (1, -1)]


@pytest.mark.parametrize(("seed", "std"), [(0, 0.15), (2, 0.15), (12, 0.15), (21, 0.2), (28, 0.2)])
def test_steep_flows_convert(seed: int, std: float) -> None:
    """Where N(0, 9) overflows, and the way back from N(0, 1) too."""
    torch.manual_seed(seed)
    flow = masked(5, 8)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(std * torch.randn_like(p))
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
    flow = Flow(T.CompositeTransform([T.Logit(), *alternating()]), StandardNormal([4]))
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


@pytest.mark.parametrize("mean", [100.0, 1e4])
def test_standardisation_far_from_zero_keeps_its_digits(mean: float) -> None:
    """(x − μ)/σ in this order: folded into x A + c, 1e4/0.6 − 1e4/0.6 loses four digits."""
    torch.manual_seed(0)
    data = mean + 0.6 * torch.randn(500, 6)
    flow = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(6), [block(), nf.flows.Permute(6), block(), nf.flows.ActNorm(6)]
    )
    flow.log_prob(data)
    truth = copy.deepcopy(flow).double().log_prob(data.double())
    allowed = 2 * (flow.log_prob(data) - truth).abs().max()
    converted = convert(flow)
    assert (converted.log_prob(data) - truth).abs().max() <= allowed
    assert [type(m) for m in converted.layers][:2] == [ActNorm, CouplingFlow]
    accelerate(flow)
    assert (flow.log_prob(data) - truth).abs().max() <= allowed
    assert any(p.requires_grad for p in converted.layers[0].parameters())


def test_one_wide_network_does_not_widen_all() -> None:
    flow = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(6), [block((16, 16)), block((512, 512)), *[block((16, 16)) for _ in range(5)]]
    )
    converted = convert(flow)
    stacked = [m for m in converted.modules() if isinstance(m, CouplingFlow)]
    assert [m.config["hidden"][0] for m in stacked] == [16, 512, 16]
    assert sum(p.numel() for p in converted.parameters()) < 1.2 * sum(p.numel() for p in flow.parameters())


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
