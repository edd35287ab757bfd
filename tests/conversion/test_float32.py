"""In float32 a fused flow keeps the digits that the library keeps, where data are far from zero or matrices steep.

That it is as close to the truth on the whole is in each library's own tests.
"""

import copy
import math
from functools import partial

import nflows.distributions
import nflows.flows
import nflows.transforms as nt
import normflows as nf
import pytest
import torch
from nflows_couplings import Net, alternating
from torch import nn

from glf_fast import ActNorm, CouplingFlow
from glf_fast.conversion import convert
from glf_fast.conversion.accelerate import accelerate

STEPS = 4


def nflows_of(dim):
    couplings = alternating(dim, STEPS, partial(Net, hidden=(32, 32), activation=nn.ReLU()))
    transforms = [t for coupling in couplings for t in (coupling, nt.LULinear(dim))]
    return nflows.flows.Flow(nt.CompositeTransform(transforms), nflows.distributions.StandardNormal([dim]))


def block(scale_map):
    return lambda dim, k: [
        nf.flows.AffineCouplingBlock(nf.nets.MLP([dim - dim // 2, 32, 32, 2 * (dim // 2)]), scale_map=scale_map),
        nf.flows.Permute(dim, "swap"),
    ]


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
    if name == "ActNorm":  # a layer of its own, which is trained
        assert [type(m) for m in converted.layers][:2] == [ActNorm, CouplingFlow]
        assert any(p.requires_grad for p in converted.layers[0].parameters())
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
