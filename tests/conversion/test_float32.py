"""In float32 a fused flow is as close to the truth (the library's flow in float64) as the library's own float32."""

import copy
import math

import FrEIA.framework as ff
import FrEIA.modules as fm
import nflows.distributions
import nflows.flows
import nflows.nn.nets
import nflows.transforms as nt
import normflows as nf
import numpy as np
import pytest
import torch
import zuko
from torch import nn

from glf_fast.conversion import convert
from glf_fast.conversion.accelerate import accelerate

STEPS = 4


def net(n_in, n_out, _=None):
    return nn.Sequential(nn.Linear(n_in, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, n_out))


def normflows_of(step):
    def build(dim):
        layers = [layer for k in range(STEPS) for layer in step(dim, k)]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), layers)

    return build


def freia_of(kind, **arguments):
    def build(dim):
        inn = ff.SequenceINN(dim)
        for _ in range(STEPS):
            inn.append(kind, subnet_constructor=net, **arguments)
            inn.append(fm.PermuteRandom)
        return inn

    return build


def nflows_of(dim):
    class Unconditional(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            self.net = net(n_in, n_out)

        def forward(self, x, context=None):
            return self.net(x)

    masks = [torch.tensor([(-1.0) ** (i + k) for i in range(dim)]) for k in range(STEPS)]
    transforms = [t for m in masks for t in (nt.AffineCouplingTransform(m, Unconditional), nt.LULinear(dim))]
    return nflows.flows.Flow(nt.CompositeTransform(transforms), nflows.distributions.StandardNormal([dim]))


def block(scale_map):
    return lambda dim, k: [
        nf.flows.AffineCouplingBlock(net(dim - dim // 2, 2 * (dim // 2)), scale_map=scale_map),
        nf.flows.Permute(dim, "swap"),
    ]


FLOWS = {
    "normflows exp": normflows_of(block("exp")),
    "normflows sigmoid": normflows_of(block("sigmoid")),
    "normflows sigmoid_inv": normflows_of(block("sigmoid_inv")),
    "normflows lu": normflows_of(lambda dim, k: [*block("exp")(dim, k), nf.flows.LULinearPermute(dim)]),
    "normflows masked": normflows_of(
        lambda dim, k: [
            nf.flows.MaskedAffineFlow((torch.arange(dim) % 2 == k % 2).float(), net(dim, dim), net(dim, dim))
        ]
    ),
    "nflows": nflows_of,
    "zuko": lambda dim: zuko.flows.RealNVP(dim, transforms=STEPS),
    "FrEIA GLOW": freia_of(fm.GLOWCouplingBlock),
    "FrEIA RNVP": freia_of(fm.RNVPCouplingBlock, clamp=1.0),
    "FrEIA NICE": freia_of(fm.NICECouplingBlock),
    "FrEIA AllInOne": freia_of(fm.AllInOneBlock),
    "FrEIA AllInOne soft": freia_of(fm.AllInOneBlock, permute_soft=True),
}


def errors(build, dim, seed):
    """Mean errors of float32 log-densities: ours, theirs."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    flow = build(dim).eval()
    for p in flow.parameters():
        if p.requires_grad:
            p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    truth = copy.deepcopy(flow).double()
    theirs = copy.deepcopy(flow)
    report = accelerate(flow)
    assert report and not report.left
    x = torch.randn(2000, dim)

    def log_prob(flow, x):
        if isinstance(flow, ff.SequenceINN):
            z, jac = flow(x)
            return jac - 0.5 * z.square().sum(1)
        return flow().log_prob(x) if isinstance(flow, zuko.lazy.Flow) else flow.log_prob(x)

    wanted = log_prob(truth, x.double())
    return [float((log_prob(f, x).double() - wanted).abs().mean()) for f in (flow, theirs)]


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")
@torch.no_grad()
def test_float32_is_as_close_to_the_truth_as_the_library():
    """One ratio of two sums of rounding errors scatters by 17 % (33 flows measured): each may, their mean may not."""
    ratios = {}
    for name, build in FLOWS.items():
        for seed, dim in enumerate((6, 15)):
            ours, theirs = errors(build, dim, seed)
            ratios[name, dim] = ours / theirs
    assert max(ratios.values()) < 1.3, ratios
    assert math.exp(sum(map(math.log, ratios.values())) / len(ratios)) < 1.05, ratios


def actnorm_between(dim):
    """The first coupling sees the data as they are; half of them reach the ActNorm unchanged."""
    layers = [layer for k in range(STEPS) for layer in block("exp")(dim, k)]
    return [*layers[:-2], nf.flows.ActNorm(dim), *layers[-2:]]


FAR = {
    "ActNorm": lambda dim: [*actnorm_between(dim), nf.flows.ActNorm(dim)],
    "ActNorm, then LU": lambda dim: [*actnorm_between(dim), nf.flows.LULinearPermute(dim), nf.flows.ActNorm(dim)],
    "ActNorm between": actnorm_between,
    "undone": lambda dim: [*block("sigmoid_inv")(dim, 0), *block("sigmoid_inv")(dim, 1), nf.flows.ActNorm(dim)],
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize(("mean", "std"), [(100.0, 1.0), (1e4, 0.6)])
@torch.no_grad()
def test_data_far_from_zero_keep_their_digits(name, mean, std):
    """An ActNorm (x − μ)·e^−s that is folded into x A + c subtracts what a matrix has rounded: 2,600 times the error."""
    dim = 6
    torch.manual_seed(0)
    data = mean + std * torch.randn(2000, dim)
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), FAR[name](dim))
    if name == "ActNorm between":  # what sees the data first must not multiply them
        for p in flow.flows[-2].parameters():
            p.zero_()
    flow.log_prob(data)
    flow.eval()
    truth = copy.deepcopy(flow).double()
    wanted = truth.log_prob(data.double())
    converted, accelerated = convert(flow), copy.deepcopy(flow)
    assert accelerate(accelerated)
    theirs = (flow.log_prob(data) - wanted).abs().mean()
    for ours in (converted, accelerated):
        assert (ours.log_prob(data) - wanted).abs().mean() < 1.3 * theirs
    z = torch.randn(500, dim)
    noise = flow.q0.loc + flow.q0.log_scale.exp() * z
    samples = truth.forward(noise.double())
    theirs = (flow.forward(noise) - samples).abs().mean()
    for ours in (converted.inverse(z)[0], accelerated.forward(noise)):
        assert (ours - samples).abs().mean() < 1.3 * theirs


@pytest.mark.parametrize("smallest", [0.1, 1e-3])
@torch.no_grad()
def test_a_shift_behind_a_steep_matrix_keeps_its_digits(smallest):
    """x W + c as (x + c W⁻¹) W rounds c W⁻¹, which W multiplies: 1,300 times the error in z."""
    dim, errors_of = 6, {"ours": 0.0, "theirs": 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        flow = nflows_of(dim)
        for layer in flow._transform._transforms[1::2]:
            diagonal = torch.logspace(0, math.log10(smallest), dim) - layer.eps
            layer.unconstrained_upper_diag.copy_(diagonal.expm1().log().nan_to_num(neginf=-10.0))
            layer.lower_entries.normal_(0, 0.3)
            layer.upper_entries.normal_(0, 0.1)
            layer.bias.normal_()
        x = torch.randn(500, dim)
        wanted = copy.deepcopy(flow).double().transform_to_noise(x.double())
        errors_of["ours"] += (convert(flow)(x)[0] - wanted).abs().mean()
        errors_of["theirs"] += (flow.transform_to_noise(x) - wanted).abs().mean()
    assert errors_of["ours"] < 1.3 * errors_of["theirs"]
