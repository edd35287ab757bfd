"""normflows' flows, converted: every coupling, mask and linear layer, hybrids, checkpoints, refusals."""

import copy

import normflows as nf
import pytest
import torch
from torch import nn

from glf_fast import CouplingFlow
from glf_fast.conversion import ConversionError, convert

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # called by normflows


@pytest.fixture
def library(Library):
    def log_prob(flow, x, context):
        return flow.log_prob(x)

    def inverse(flow, z, context):
        return flow(flow.q0.loc + z * flow.q0.log_scale.exp())

    return Library(log_prob, inverse)


def block(dim, scale=True, scale_map="exp", split_mode="channel", **mlp):
    half = dim - dim // 2
    p, t = (half, dim - half) if split_mode == "channel" else (dim - half, half)
    net = nf.nets.MLP([p, 16, 11, 2 * t if scale else t], init_zeros=True, **mlp)
    return nf.flows.AffineCouplingBlock(net, scale, scale_map, split_mode)


def masked(dim, k, s=True, t=True):
    mask = torch.tensor([float((i + k) % 2) for i in range(dim)])
    nets = [nf.nets.MLP([dim, 13, dim], init_zeros=True) if wanted else None for wanted in (t, s)]
    return nf.flows.MaskedAffineFlow(mask, *nets)


def actnorm(dim):
    layer = nf.flows.ActNorm(dim)
    layer.inverse(1 + 2 * torch.randn(60, dim))
    return layer


STEPS = {
    "exp": lambda dim, k: [block(dim), nf.flows.Permute(dim, "swap")],
    "sigmoid": lambda dim, k: [block(dim, scale_map="sigmoid"), nf.flows.Permute(dim, "shuffle")],
    "sigmoid_inv": lambda dim, k: [block(dim, scale_map="sigmoid_inv"), nf.flows.Permute(dim, "shuffle")],
    "both halves": lambda dim, k: [block(dim, split_mode="channel"), block(dim, split_mode="channel_inv", leaky=0.01)],
    "additive": lambda dim, k: [block(dim, scale=False), nf.flows.Permute(dim, "swap")],
    "masked": lambda dim, k: [masked(dim, k)],
    "masked, no scale": lambda dim, k: [masked(dim, k, s=False)],
    "masked, no shift": lambda dim, k: [masked(dim, k, t=False), nf.flows.AffineConstFlow((dim,))],
    "Glow's step": lambda dim, k: [block(dim), nf.flows.InvertibleAffine(dim), actnorm(dim)],
    "free matrix": lambda dim, k: [block(dim), nf.flows.InvertibleAffine(dim, use_lu=False)],
    "LU": lambda dim, k: [block(dim), nf.flows.LULinearPermute(dim)],
}


@pytest.mark.parametrize("dim", [2, 6, 7])
@pytest.mark.parametrize("step", STEPS)
def test_every_layer(step, dim, prove, library, shake):
    layers = [layer for k in range(3) for layer in STEPS[step](dim, k)]
    flow = shake(nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), layers), 0.1)
    converted = prove(library, flow, dim)
    # Two activations in turn are six flows.
    flows = sum(isinstance(module, CouplingFlow) for module in converted.modules())
    assert flows == (6 if step == "both halves" else 1)


def test_trained_checkpoint(tmp_path, prove, library):
    """Trained and saved by the library, loaded into a fresh flow, then converted; training goes on from there."""

    def build():
        layers = [layer for _ in range(3) for layer in (block(5), actnorm(5), nf.flows.LULinearPermute(5))]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(5), layers)

    flow = build()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    x = torch.randn(256, 5).cumsum(1)
    for _ in range(30):
        optimizer.zero_grad()
        flow.forward_kld(x).backward()
        optimizer.step()
    flow.save(tmp_path / "flow.pt")
    loaded = build()
    loaded.load(tmp_path / "flow.pt")
    converted = prove(library, loaded, 5)
    torch.testing.assert_close(-converted.log_prob(x).mean(), flow.forward_kld(x))


def test_training_takes_the_same_path():
    """Without linear layers the parameters are the library's, stacked: SGD makes the same steps."""
    layers = [layer for _ in range(2) for layer in (block(6), nf.flows.Permute(6, "swap"))]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(6, trainable=False), layers).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    converted = convert(flow)
    x = torch.randn(200, 6).double().cumsum(1)
    for model in (flow, converted):
        optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            (-model.log_prob(x).mean()).backward()
            optimizer.step()
    torch.testing.assert_close(converted.log_prob(x), flow.log_prob(x), rtol=1e-9, atol=1e-9)


def test_hybrid_of_splines_and_couplings(library, shake):
    spline = nf.flows.CoupledRationalQuadraticSpline(6, 1, 8)
    layers = [block(6), block(6, split_mode="channel_inv"), spline, nf.flows.LULinearPermute(6), block(6)]
    flow = shake(nf.NormalizingFlow(nf.distributions.DiagGaussian(6), layers), 0.1)
    converted = convert(flow)
    assert sum(isinstance(module, CouplingFlow) for module in converted.modules()) == 2
    x = torch.randn(50, 6)
    torch.testing.assert_close(converted.log_prob(x), flow.log_prob(x), rtol=1e-4, atol=1e-4)
    z = converted(x)[0]
    torch.testing.assert_close(converted.inverse(z)[0], x, rtol=1e-3, atol=1e-3)
    before = copy.deepcopy(spline.state_dict())
    optimizer = torch.optim.SGD(converted.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        loss = -converted.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], value) for name, value in spline.state_dict().items())  # it holds a copy


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (lambda: nf.NormalizingFlow(nf.distributions.GaussianMixture(2, 4), [block(4)]), "GaussianMixture"),
        (lambda: nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [nf.flows.ActNorm(4), block(4)]), "initialised"),
        (lambda: nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [block(4), nf.flows.BatchNorm()]), "BatchNorm"),
        (lambda: nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [nf.flows.Permute(4)]), "no coupling"),
        (
            lambda: nf.NormalizingFlow(
                nf.distributions.DiagGaussian(4),
                [nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4], output_fn="tanh"))],
            ),
            r"flows\.0 \(AffineCouplingBlock\)",
        ),
        (lambda: nf.ClassCondFlow(nf.distributions.DiagGaussian(4), [block(4)]), "ClassCondFlow"),
        (lambda: nn.ModuleList(), "no flow of"),
    ],
)
def test_refusals(flow, message):
    with pytest.raises(ConversionError, match=message):
        convert(flow())
