"""normflows' flows, converted: every coupling, mask and linear layer, bases, hybrids, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import normflows as nf
import pytest
import torch

from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.layers import FROZEN, TRAINED, Coupling, Dense, Diagonal, Kept, Permutation
from glf_fast.conversion.normflows import LIBRARY
from glf_fast.conversion.reading import read_flow

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # called by normflows


@pytest.fixture
def library(tools):
    def log_prob(flow, x, context):
        return flow.log_prob(x) if context is None else flow.log_prob(x, context)

    def inverse(flow, z, context):
        z = flow.q0.loc + z * flow.q0.log_scale.exp()
        return flow(z) if context is None else flow(z, context)

    return tools.Library(LIBRARY, log_prob, inverse)


def block(dim, scale=True, scale_map="exp", split_mode="channel", **mlp):
    passive = dim // 2 if split_mode == "channel_inv" else dim - dim // 2
    transformed = (dim - passive) * (2 if scale else 1)
    net = nf.nets.MLP([passive, 16, 11, transformed], **{"init_zeros": True, **mlp})
    return nf.flows.AffineCouplingBlock(net, scale, scale_map, split_mode)


def masked(dim, k, s=True, t=True, mask=None):
    mask = torch.tensor([float((i + k) % 2) for i in range(dim)]) if mask is None else mask
    nets = [
        nf.nets.MLP([dim, hidden, dim], init_zeros=True) if wanted else None for wanted, hidden in ((t, 13), (s, 9))
    ]
    return nf.flows.MaskedAffineFlow(mask, *nets)


def actnorm(dim):
    layer = nf.flows.ActNorm(dim)
    layer.inverse(1 + 2 * torch.randn(60, dim))
    return layer


def mlp(n_in, n_out, leaky=0.0, hidden=(11, 7)):
    return nf.nets.MLP([n_in, *hidden, n_out], leaky=leaky)


def flow_of(*layers, dim=4, trainable=True, kind=nf.NormalizingFlow):
    return kind(nf.distributions.DiagGaussian(dim, trainable=trainable), list(layers))


# name → (D, k) → layers of step k; what three steps become
CASES = {
    "exp": (lambda d, k: [block(d), nf.flows.Permute(d, "swap")], "3"),
    "sigmoid": (lambda d, k: [block(d, scale_map="sigmoid"), nf.flows.Permute(d, "shuffle")], "3"),
    "sigmoid_inv": (lambda d, k: [block(d, scale_map="sigmoid_inv"), nf.flows.Permute(d, "shuffle")], "3"),
    # Two activations in turn are six flows.
    "both halves": (lambda d, k: [block(d), block(d, split_mode="channel_inv", leaky=0.01)], "1 1 1 1 1 1"),
    # Two slopes in turn, too.
    "slopes": (lambda d, k: [block(d, leaky=0.2), block(d, split_mode="channel_inv", leaky=0.1)], "1 1 1 1 1 1"),
    "one slope": (lambda d, k: [block(d, leaky=0.2), nf.flows.Permute(d, "swap")], "3"),
    "additive": (lambda d, k: [block(d, scale=False), block(d, False, split_mode="channel_inv")], "6"),
    "masked": (lambda d, k: [masked(d, k)], "3"),
    "any mask": (lambda d, k: [masked(d, k, mask=(torch.arange(d).roll(k) < 1 + k % (d - 1)).float())], "3"),
    "masked, no scale": (lambda d, k: [masked(d, k, s=False)], "3"),
    "masked, no shift": (lambda d, k: [masked(d, k, t=False), nf.flows.AffineConstFlow((d,))], "3"),
    "Glow's step": (lambda d, k: [block(d), nf.flows.InvertibleAffine(d), actnorm(d)], "3"),
    "free matrix": (lambda d, k: [block(d), nf.flows.InvertibleAffine(d, use_lu=False)], "3"),
    "LU": (lambda d, k: [block(d), nf.flows.LULinearPermute(d, identity_init=False)], "3"),
    "composite": (lambda d, k: [nf.flows.Composite([block(d), nf.flows.Permute(d, "swap")]), actnorm(d)], "3"),
    "checkerboards": (lambda d, k: [block(d, split_mode="checkerboard" + k % 2 * "_inv")], "3"),
}


@pytest.mark.parametrize("dim", [2, 6, 7])
@pytest.mark.parametrize("name", CASES)
def test_every_layer(name, dim, library, tools):
    if name == "checkerboards" and dim % 2:
        pytest.skip("of an even number of columns")
    if name == "composite":  # its own log-determinant is float32
        library = replace(library, tolerance=1e-5)
    step, outline = CASES[name]
    layers = [layer for k in range(3) for layer in step(dim, k)]
    tools.prove(library, tools.shake(flow_of(*layers, dim=dim), 0.1), dim, outline=outline)


def test_float32_is_as_close_to_the_truth(library, tools):
    flows = [flow_of(*(layer for k in range(4) for layer in step(6, k)), dim=6) for step, _ in CASES.values()]
    tools.as_close(library, [tools.shake(flow) for flow in flows], (6,), most=1.05)


def test_trained_checkpoint(library, tools):
    def build():
        layers = [layer for _ in range(3) for layer in (block(5), actnorm(5), nf.flows.LULinearPermute(5))]
        return flow_of(*layers, dim=5)

    tools.prove(library, tools.trained(library, build, torch.randn(256, 5).cumsum(1)), 5, outline="3")


def test_training_takes_the_same_path():
    """Without linear layers the parameters are the library's, stacked: SGD makes the same steps."""
    layers = [layer for _ in range(2) for layer in (block(6), nf.flows.Permute(6, "swap"))]
    flow = flow_of(*layers, dim=6, trainable=False).double()
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


def test_what_is_kept_says_why(library, tools):
    """Splines, residual and shared networks; of what is kept the converted flow has a copy."""
    shared = mlp(2, 4)
    spline = nf.flows.CircularAutoregressiveRationalQuadraticSpline(4, 1, 8, [1])
    sigmoid = nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4], output_fn="sigmoid"))
    twice = [nf.flows.AffineCouplingBlock(shared) for _ in range(2)]
    flow = tools.shake(flow_of(block(4), spline, *twice, sigmoid, block(4)), 0.1)
    reading = read_flow(LIBRARY, copy.deepcopy(flow).double())
    assert [type(layer) for layer in reading.layers] == [Coupling, Kept, Kept, Kept, Kept, Coupling, Diagonal]
    reasons = [layer.reason for layer in reading.layers if isinstance(layer, Kept)]
    assert "flows.4" in reasons[0] and "Sigmoid" in reasons[0]
    assert "flows.3" in reasons[1] and "shares parameters" in reasons[1]
    assert "flows.1 (CircularAutoregressiveRationalQuadraticSpline)" in reasons[3]
    before = copy.deepcopy(spline.state_dict())
    tools.prove(replace(library, tolerance=1e-7), flow, 4, outline="1" + 4 * " KeptLayer" + " 1")
    assert all(torch.equal(before[name], value) for name, value in spline.state_dict().items())


def test_conditional_flow_with_splines_keeps_the_context(library, tools):
    """No coupling of normflows takes one: these flows are not converted, but read."""
    layers = [
        nf.flows.LULinearPermute(5, identity_init=False),
        nf.flows.CoupledRationalQuadraticSpline(5, 1, 8, num_context_channels=3),
        nf.flows.InvertibleAffine(5),
    ]
    flow = tools.shake(flow_of(*layers, dim=5, kind=nf.ConditionalNormalizingFlow), 0.1).double()
    assert read_flow(LIBRARY, flow).context_shape == (3,)
    x, context = torch.randn(16, 5).double(), torch.randn(16, 3).double()
    tools.same_map(replace(library, tolerance=1e-7), flow, x, context)


def test_what_is_trained_is_known():
    flow = flow_of(block(4), nf.flows.LULinearPermute(4), masked(4, 0), trainable=False)
    flow.flows[1].requires_grad_(False)
    flow.flows[0].flows[1].param_map.net[0].requires_grad_(False)
    coupling, permutation, dense, last = read_flow(LIBRARY, flow).layers  # and no layer of a base N(0, I) that is fixed
    assert isinstance(permutation, Permutation) and isinstance(dense, Dense) and not dense.trained
    assert (last.conditioner.roles[0] == FROZEN).all() and (last.conditioner.roles[1] == TRAINED).all()
    assert coupling.conditioner.separate
    assert isinstance(read_flow(LIBRARY, flow_of(block(4))).layers[-1], Diagonal), "a base that is trained"


def cold(flow):
    flow.q0.temperature = 0.7
    return flow


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nf.NormalizingFlow(nf.distributions.GaussianMixture(2, 4), [block(4)]), "GaussianMixture"),
        (lambda: flow_of(block(4), dim=(4, 4)), r"on samples of shape \(4, 4\)"),
        (lambda: cold(flow_of(block(4))), r"temperature is 0\.7"),
        (lambda: flow_of(nf.flows.ActNorm(4), block(4)), "has not been initialised"),
        (lambda: flow_of(block(4), nf.flows.BatchNorm()), r"BatchNorm.: it normalises"),
        (lambda: flow_of(nf.flows.Split(), nf.flows.Merge()), "use an AffineCouplingBlock"),
        (lambda: flow_of(nf.flows.Permute(4)), "no coupling"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConversionError, match=message):
        convert(make())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nf.flows.AffineCouplingBlock(mlp(3, 4, hidden=(5,) * 9)), "9 hidden layers"),
        (lambda: nf.flows.AffineCouplingBlock(mlp(3, 6)), "3 columns to 6"),
        (lambda: block(5, split_mode="checkerboard"), "does not split 5 columns"),
        (lambda: nf.flows.AffineConstFlow((5,), shift=False), "only some of its parameters"),
        (lambda: nf.flows.MaskedAffineFlow(torch.tensor([0.5, 0.5, 0, 1, 1]), mlp(5, 5), mlp(5, 5)), "not one 0 or 1"),
        (lambda: nf.flows.MaskedAffineFlow(torch.zeros(5), mlp(5, 5), mlp(5, 5)), "leaves no column"),
        (lambda: nf.flows.MaskedAffineFlow(torch.eye(5)[0], mlp(5, 5), mlp(5, 5, 0.01)), "in depth or activation"),
        (partial(nf.flows.Planar, (5,)), "no kernel covers"),
    ],
)
def test_reasons_of_layers_that_are_kept(layer, reason):
    (kept,) = read_flow(LIBRARY, flow_of(layer(), dim=5, trainable=False)).layers
    assert isinstance(kept, Kept) and reason in kept.reason and "flows.0" in kept.reason
