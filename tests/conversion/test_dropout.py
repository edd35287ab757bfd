"""Dropout of FrEIA's and nflows' networks in fused flows: equal in eval mode, and equally distributed in training mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import FrEIA.framework as ff
import FrEIA.modules as fm
import nflows.distributions
import pytest
import torch
from nflows import transforms as T
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn

from glf_fast import CouplingFlow
from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.accelerate import accelerate

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:FrEIA")
D, P = 6, 0.25


def subnet(n_in: int, n_out: int, p: float = P, before: bool = True) -> nn.Module:
    """Networks with dropout before the activation, as FrEIA's examples have it, or behind."""
    between = [nn.Dropout(p), nn.ReLU()] if before else [nn.Tanh(), nn.Dropout(p)]
    return nn.Sequential(nn.Linear(n_in, 24), *between, nn.Linear(24, 24), *between, nn.Linear(24, n_out))


def freia(steps: int = 2, block: type = fm.GLOWCouplingBlock) -> nn.Module:
    torch.manual_seed(0)
    net = ff.SequenceINN(D)
    for _ in range(steps):
        net.append(block, subnet_constructor=subnet)
    return shaken(net)


def of_nflows(
    steps: int = 2, net: Callable[[int, int], nn.Module] = lambda a, b: ResidualNet(a, b, 24, dropout_probability=P)
) -> nn.Module:
    torch.manual_seed(0)
    couplings = [
        T.AffineCouplingTransform(torch.tensor([(-1) ** (i + k) for i in range(D)]), net) for k in range(steps)
    ]
    return shaken(Flow(T.CompositeTransform(couplings), nflows.distributions.StandardNormal([D])))


def shaken(flow: nn.Module) -> nn.Module:
    """The flow with parameters that are not initial ones."""
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return flow


def encoded(flow: nn.Module, x: Tensor) -> Tensor:
    """Noise and log-determinant (B, D + 1)."""
    z, logdet = flow(x) if isinstance(flow, ff.SequenceINN) else flow._transform(x)
    return torch.cat([z, torch.as_tensor(logdet).to(z).expand(len(z))[:, None]], 1)  # NICE's is a float


FLOWS: dict[str, Callable[[int], nn.Module]] = {
    "freia": freia,
    "freia-rnvp": lambda steps: freia(steps, fm.RNVPCouplingBlock),
    "freia-nice": lambda steps: freia(steps, fm.NICECouplingBlock),
    "nflows": of_nflows,
    "nflows-mlp": lambda steps: of_nflows(steps, lambda a, b: Whatever(a, b)),
}


class Whatever(nn.Module):
    """A network that is given a context and ignores it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.net = subnet(n_in, n_out, before=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FLOWS)
def test_nothing_is_lost_in_either_mode(name: str, training: bool) -> None:
    original = FLOWS[name](2).train(training)
    fast = copy.deepcopy(original)
    report = accelerate(fast)
    assert report.replaced and not report.left and not any(r.lost for r in report.replaced)
    fused = [module for module in fast.modules() if isinstance(module, CouplingFlow)]
    assert [f.config["dropout"] for f in fused] == [P] * len(fused) and {f.training for f in fused} == {training}
    assert fast.training == training
    x = torch.randn(20, D)
    torch.testing.assert_close(encoded(fast.eval(), x), encoded(original.eval(), x), rtol=1e-4, atol=1e-5)
    fast.train()
    torch.manual_seed(5)
    a, b = encoded(fast, x), encoded(fast, x)
    torch.manual_seed(5)
    assert torch.equal(encoded(fast, x), a) and not torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if name.startswith("nflows"):
            converted = convert(original.train(training))
            assert converted.training == training
            assert not torch.equal(converted.train()(x)[0], converted(x)[0])


@pytest.mark.parametrize("name", FLOWS)
def test_training_mode_has_the_mean_and_the_spread_of_the_library(name: str) -> None:
    """One step, and in FrEIA two half steps, over many masks: each row of a batch of equal rows has masks of its own."""
    original = FLOWS[name](1).double().train()
    fast = copy.deepcopy(original)
    assert accelerate(fast)
    x = torch.randn(1, D, dtype=torch.float64).expand(20_000, D).contiguous()
    with torch.no_grad():
        wanted, got = encoded(original, x), encoded(fast, x)
    error = ((wanted.var(0) + got.var(0)) / len(x)).sqrt()
    assert ((wanted.mean(0) - got.mean(0)).abs() <= 4.5 * error + 1e-9).all()
    varying = wanted.std(0) > 1e-9
    assert varying.any() and torch.equal(varying, got.std(0) > 1e-9)
    ratio = (got.std(0) / wanted.std(0))[varying]
    assert ((ratio - 1).abs() < 0.1).all()


def test_couplings_of_different_probabilities_are_not_stacked() -> None:
    torch.manual_seed(0)
    net = ff.SequenceINN(D)
    for p in (0.1, 0.1, 0.3):
        net.append(fm.GLOWCouplingBlock, subnet_constructor=lambda a, b, p=p: subnet(a, b, p))
    net = shaken(net)
    report = accelerate(net)
    fused = [module for module in net.modules() if isinstance(module, CouplingFlow)]
    assert [(f.config["dropout"], f.config["steps"]) for f in fused] == [(0.1, 4), (0.3, 2)] and not report.left


def test_networks_of_two_probabilities_in_one_coupling() -> None:
    """They are fused without dropout in eval mode, which is said, and stay in training mode."""
    made = iter([0.1, 0.3] * 2)
    torch.manual_seed(0)
    net = ff.SequenceINN(D)
    net.append(fm.RNVPCouplingBlock, subnet_constructor=lambda a, b: subnet(a, b, next(made)))
    report = accelerate(copy.deepcopy(net).eval())
    assert report.replaced[0].lost == "Dropout (p = 0.3)"
    report = accelerate(net)
    assert not report and "is active; convert the flow in eval mode" in str(report)


def test_wide_couplings_keep_a_network_whose_dropout_is_active() -> None:
    torch.manual_seed(0)
    net = ff.SequenceINN(260)
    net.append(fm.AllInOneBlock, subnet_constructor=subnet)
    fast = copy.deepcopy(net)
    assert accelerate(fast).replaced[0].into["AffineCoupling"] == 1
    x = torch.randn(5, 260)
    found = []
    for flow in (net, fast):
        torch.manual_seed(1)
        found.append(encoded(flow, x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_network_in_another_mode_than_its_flow() -> None:
    flow = of_nflows()
    for module in flow.modules():
        if isinstance(module, ResidualNet):
            module.eval()
    with pytest.raises(ConversionError, match="in another mode than its flow"):
        convert(flow)
    report = accelerate(flow)
    assert not report and "in another mode than its flow" in str(report)


def test_it_trains_as_the_library_does() -> None:
    """The same losses, up to chance, of 300 steps."""
    original = freia().train()
    fast = copy.deepcopy(original)
    accelerate(fast)
    ends = []
    for flow in (original, fast):
        torch.manual_seed(2)
        optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], 2e-3)
        for _ in range(300):
            z, logdet = flow(1.5 * torch.randn(128, D) + 1)
            loss = (0.5 * z.square().sum(1) - logdet).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x = 1.5 * torch.randn(4000, D, generator=torch.Generator().manual_seed(3)) + 1
        z, logdet = flow.eval()(x)
        ends.append((0.5 * z.square().sum(1) - logdet).mean().item())
    assert abs(ends[0] - ends[1]) < 0.15, ends
