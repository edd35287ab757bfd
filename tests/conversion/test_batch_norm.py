"""Batch norm within the networks of couplings: folded into linear layers in eval mode, left alone in training mode."""

from __future__ import annotations

import copy
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import normflows as nf
import pytest
import torch
from nflows import transforms as T
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch import Tensor, nn

from glf_fast import AffineCoupling, CouplingFlow
from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.accelerate import accelerate


def network(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_in, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Linear(8, n_out),
    )  # fmt: skip


class Written(nn.Module):
    """The same as nflows calls it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.body = network(n_in, n_out)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.body(x)


def of_freia(dim: int) -> ff.SequenceINN:
    inn = ff.SequenceINN(dim)
    for _ in range(2):
        inn.append(fm.GLOWCouplingBlock, subnet_constructor=network)
        inn.append(fm.PermuteRandom)
    return inn


def of_normflows(dim: int) -> nf.NormalizingFlow:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nf.flows.AffineCouplingBlock(network(dim // 2, dim)), nf.flows.Permute(dim)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)


def of_nflows(dim: int) -> Flow:
    layers = [T.AffineCouplingTransform((torch.arange(dim) + k) % 2, Written) for k in range(2)]
    return Flow(T.CompositeTransform(layers), StandardNormal([dim]))


def log_prob(flow: Any, x: Tensor) -> Tensor:
    if not isinstance(flow, ff.SequenceINN):
        return flow.log_prob(x)
    z, logdet = flow(x)
    return logdet - z.square().sum(1) / 2


FLOWS = {"FrEIA": of_freia, "normflows": of_normflows, "nflows": of_nflows}


def used(name: str, dim: int = 6) -> nn.Module:
    """A flow that has seen data, in training mode."""
    torch.manual_seed(0)
    flow = FLOWS[name](dim).train()
    for module in flow.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        log_prob(flow, 2 * torch.randn(50, dim) + 1)
    return flow


@pytest.mark.parametrize("name", FLOWS)
def test_in_eval_mode_it_is_fused_and_the_report_says_so(name: str) -> None:
    flow = used(name).eval()
    fast = copy.deepcopy(flow)
    report = accelerate(fast)
    (replaced,) = report.replaced
    assert replaced.lost == "BatchNorm" and "Coupling" in replaced.reparametrised and not report.left
    assert "no longer applies BatchNorm in training mode" in str(report)
    assert any(isinstance(module, CouplingFlow) for module in fast.modules())
    x = torch.randn(40, 6, requires_grad=True)
    pairs = [log_prob(f, x) for f in (flow, fast)]
    torch.testing.assert_close(pairs[1], pairs[0], rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(p.sum(), x)[0] for p in pairs]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FLOWS)
def test_in_training_mode_it_stays(name: str) -> None:
    flow = used(name)
    before = [type(module) for module in flow.modules()]
    report = accelerate(flow)
    assert not report and "batch norm takes the statistics of each batch; in eval mode" in str(report)
    assert [type(module) for module in flow.modules()] == before


def test_a_wide_coupling_keeps_its_network_in_training_mode() -> None:
    flow = used("FrEIA", 256)
    assert accelerate(flow)
    kinds = [type(module) for module in flow.modules()]
    assert kinds.count(AffineCoupling) == 4 and kinds.count(nn.BatchNorm1d) == 8


def test_converted_and_frozen() -> None:
    flow = used("normflows").eval()
    with pytest.warns(UserWarning, match="does not apply BatchNorm in training mode"):
        trained = convert(flow)
    assert any(p.requires_grad for p in trained.parameters())
    x = torch.randn(40, 6)
    torch.testing.assert_close(trained.log_prob(x), flow.log_prob(x), rtol=1e-4, atol=1e-5)
    flow.requires_grad_(False)
    with pytest.warns(UserWarning, match="does not apply BatchNorm in training mode"):
        frozen = convert(flow)
    assert not any(p.requires_grad for p in frozen.parameters())
    flow.flows[0].flows[1].param_map[1].requires_grad_(True)
    with pytest.raises(ConversionError, match="only some of its parameters are trained"):
        convert(nf.NormalizingFlow(flow.q0, list(flow.flows[:1])))
