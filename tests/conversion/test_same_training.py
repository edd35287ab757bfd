"""An accelerated flow trains as the original does, or the report says for which layers it trains other parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import FrEIA.framework as ff
import FrEIA.modules as fm
import nflows.distributions as nd
import nflows.flows
import nflows.transforms as nt
import normflows as nf
import numpy as np
import pytest
import torch
import zuko
from library_flows import log_prob, losses, shake
from nflows.nn.nets import ResidualNet
from nflows_couplings import Net
from torch import nn

from glf_fast import CouplingFlow, accelerate

pytestmark = pytest.mark.filterwarnings("ignore:torch.(lu|qr) is deprecated:UserWarning")  # called by the libraries

DIM = 6
Make = Callable[[], nn.Module]


def subnet(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n_in, 12), nn.Tanh(), nn.Linear(12, n_out))


def of_normflows(*layers: Make, trained_base: bool = False) -> Make:
    """Two times the layers, and a coupling after each."""

    def make() -> nn.Module:
        flows = [layer() for _ in range(2) for layer in layers]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(DIM, trainable=trained_base), flows)

    return make


def block(**options: object) -> Make:
    half = DIM // 2
    return lambda: nf.flows.AffineCouplingBlock(
        subnet(half, 2 * half if options.get("scale", True) else half), **options
    )


def masked() -> nn.Module:
    mask = torch.tensor([1.0, 0] * (DIM // 2))
    return nf.flows.MaskedAffineFlow(mask, *(nf.nets.MLP([DIM, 12, DIM]) for _ in range(2)))


def mlp_of_nflows(n_in: int, n_out: int) -> nn.Module:
    return Net(n_in, n_out, (12,), nn.Tanh())


def residual(n_in: int, n_out: int) -> nn.Module:
    return ResidualNet(n_in, n_out, 12, activation=torch.tanh)


def of_nflows(
    *layers: Make,
    kind: type = nt.AffineCouplingTransform,
    base: type = nd.StandardNormal,
    net: Callable[[int, int], nn.Module] = mlp_of_nflows,
) -> Make:
    def make() -> nn.Module:
        masks = [torch.tensor([(-1) ** (i + k) for i in range(DIM)]) for k in range(2)]
        couplings = [kind(mask, net) for mask in masks]
        transforms = [t for coupling in couplings for t in (*(layer() for layer in layers), coupling)]
        return nflows.flows.Flow(nt.CompositeTransform(transforms), base([DIM]))

    return make


def of_zuko(*layers: Make, kind: type = zuko.flows.RealNVP) -> Make:
    def make() -> nn.Module:
        flow = kind(DIM, transforms=2, hidden_features=(12,), activation=nn.Tanh)
        return zuko.flows.Flow([*(layer() for layer in layers), *flow.transform.transforms], flow.base)

    return make


def of_freia(kind: type, after: Callable[[nn.Module], object] = lambda inn: None, **options: object) -> Make:
    def make() -> nn.Module:
        np.random.seed(0)
        inn = ff.SequenceINN(DIM)
        for _ in range(2):
            inn.append(kind, subnet_constructor=subnet, **options)
            inn.append(fm.PermuteRandom)
        after(inn)
        return inn

    return make


def add_actnorm(inn: nn.Module) -> None:
    inn.append(fm.ActNorm)


def freeze_affine(inn: nn.Module) -> None:
    for name, p in inn.named_parameters():
        p.requires_grad_(p.requires_grad and "global" not in name)


def affine_of_zuko() -> nn.Module:
    transform = zuko.transforms.MonotonicAffineTransform
    return zuko.lazy.UnconditionalTransform(transform, torch.randn(DIM), torch.randn(DIM))


def lu_of_zuko() -> nn.Module:
    return zuko.lazy.UnconditionalTransform(
        zuko.transforms.LULinearTransform, torch.eye(DIM) + 0.1 * torch.randn(DIM, DIM)
    )


# Flow → the layers that the report names: "" where all steps are the original's.
CASES: dict[str, tuple[Make, str]] = {
    "normflows exp": (of_normflows(block(), lambda: nf.flows.Permute(DIM)), ""),
    "normflows sigmoid": (of_normflows(block(scale_map="sigmoid")), ""),
    "normflows sigmoid_inv": (of_normflows(block(scale_map="sigmoid_inv")), ""),
    "normflows additive": (of_normflows(block(scale=False)), ""),
    "normflows masked": (of_normflows(masked), ""),
    "normflows AffineConstFlow": (of_normflows(block(), lambda: nf.flows.AffineConstFlow((DIM,))), ""),
    "normflows trained base": (of_normflows(block(), trained_base=True), ""),
    "normflows LULinearPermute": (of_normflows(block(), lambda: nf.flows.LULinearPermute(DIM)), "LULinearPermute"),
    "normflows InvertibleAffine": (of_normflows(block(), lambda: nf.flows.InvertibleAffine(DIM, use_lu=False)), ""),
    "normflows InvertibleAffine, LU": (
        of_normflows(block(), lambda: nf.flows.InvertibleAffine(DIM)),
        "",
    ),
    "nflows affine": (of_nflows(), ""),
    "nflows additive": (of_nflows(kind=nt.AdditiveCouplingTransform), ""),
    "nflows residual": (of_nflows(net=residual), ""),
    "nflows additive residual": (of_nflows(net=residual, kind=nt.AdditiveCouplingTransform), ""),
    "nflows permutation": (of_nflows(lambda: nt.RandomPermutation(DIM)), ""),
    "nflows trained base": (of_nflows(base=nd.DiagonalNormal), ""),
    "nflows LULinear": (of_nflows(lambda: nt.LULinear(DIM)), "LULinear"),
    "nflows QRLinear": (of_nflows(lambda: nt.QRLinear(DIM, DIM)), "QRLinear"),
    "nflows SVDLinear": (of_nflows(lambda: nt.SVDLinear(DIM, DIM)), "SVDLinear"),
    "nflows NaiveLinear": (of_nflows(lambda: nt.NaiveLinear(DIM)), "NaiveLinear"),
    "nflows ActNorm": (of_nflows(lambda: nt.ActNorm(DIM)), "ActNorm"),
    "zuko RealNVP": (of_zuko(), ""),
    "zuko NICE": (of_zuko(kind=zuko.flows.NICE), ""),
    "zuko MonotonicAffineTransform": (of_zuko(affine_of_zuko), "UnconditionalTransform"),
    "zuko LULinearTransform": (of_zuko(lu_of_zuko), "UnconditionalTransform"),
    "FrEIA GLOW": (of_freia(fm.GLOWCouplingBlock, clamp=1.3), ""),
    "FrEIA GLOW tanh": (of_freia(fm.GLOWCouplingBlock, clamp=1.3, clamp_activation="TANH"), ""),
    "FrEIA GLOW sigmoid": (of_freia(fm.GLOWCouplingBlock, clamp_activation="SIGMOID"), ""),
    "FrEIA GLOW linear": (of_freia(fm.GLOWCouplingBlock, clamp_activation=lambda u: 0.2 * u), ""),
    "FrEIA GLOW uneven": (of_freia(fm.GLOWCouplingBlock, clamp_activation="TANH", split_len=2), ""),
    "FrEIA RNVP": (of_freia(fm.RNVPCouplingBlock, clamp=1.5, clamp_activation="TANH"), ""),
    "FrEIA NICE": (of_freia(fm.NICECouplingBlock), ""),
    "FrEIA one-sided": (of_freia(fm.AffineCouplingOneSided, clamp_activation="TANH"), ""),
    "FrEIA AllInOne, its global scale frozen": (of_freia(fm.AllInOneBlock, freeze_affine), ""),
    "FrEIA AllInOne, soft, frozen": (of_freia(fm.AllInOneBlock, freeze_affine, permute_soft=True), ""),
    "FrEIA AllInOne": (of_freia(fm.AllInOneBlock), "AllInOneBlock"),
    "FrEIA ActNorm": (of_freia(fm.GLOWCouplingBlock, add_actnorm), "ActNorm"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_steps(name: str) -> None:
    make, other = CASES[name]
    torch.manual_seed(0)
    flow = make().double()
    x = 1.5 * torch.randn(20, 32, DIM, dtype=torch.float64) + 0.3
    log_prob(flow, x[0])  # starts ActNorms
    shake(flow, 0.1)
    fast = copy.deepcopy(flow)
    report = accelerate(fast)
    assert report and sum(r.couplings for r in report.replaced) >= 2, report
    assert ", ".join(r.reparametrised for r in report.replaced if r.reparametrised) == other
    assert (f"trains other parameters for {other}" in str(report)) == bool(other)
    for optimizer, rate in ((torch.optim.Adam, 1e-2), (torch.optim.SGD, 1e-3)):
        wanted, got = (losses(copy.deepcopy(f), optimizer, rate, x) for f in (flow, fast))
        difference = (got - wanted).abs().max().item()
        assert (difference > 1e-5) if other else (difference < 1e-8 * wanted.abs().max()), (optimizer, difference)


def test_fixed_factors_are_saved_loaded_and_copied() -> None:
    torch.manual_seed(0)
    flow = CouplingFlow(4, 2, (8,), linear="permutation", actnorm=False)
    plain = copy.deepcopy(flow)
    factor = torch.tensor([0.5, 0.5, 2.0, 2.0])
    flow.multiply("mlp_weights.1", factor)
    flow.multiply("mlp_biases.1", factor)
    with torch.no_grad():
        for p in (plain.mlp_weights[1], plain.mlp_biases[1]):
            p.mul_(factor)
    x = torch.randn(5, 4)
    torch.testing.assert_close(flow.log_prob(x), plain.log_prob(x))
    torch.testing.assert_close(flow.to_layers().log_prob(x), plain.log_prob(x))
    rebuilt = CouplingFlow(**flow.config)
    rebuilt.load_state_dict(flow.state_dict())
    for other in (rebuilt, copy.deepcopy(flow)):
        assert torch.equal(other.log_prob(x), flow.log_prob(x))
    trained = torch.ones_like(flow.mlp_biases[1], dtype=torch.bool)
    trained[0, 0] = False
    flow.hold("mlp_biases.1", trained)  # at its value, the factor's share in it included
    with torch.no_grad():
        flow.mlp_biases[1][0, 0] += 1
    assert torch.equal(flow.log_prob(x), rebuilt.log_prob(x))
