"""normflows flows are read as the layers that they are: values, gradients of every parameter, inverse; or refused."""

import normflows as nf
import pytest
import torch
from torch import nn

from glf_fast.conversion import ConversionError
from glf_fast.conversion.layers import FROZEN, TRAINED, Coupling, Dense, Diagonal, Kept, Permutation
from glf_fast.conversion.normflows import LIBRARY
from glf_fast.conversion.reading import read_flow

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # called by normflows


def mlp(n_in, n_out, leaky=0.0, hidden=(11, 7)):
    return nf.nets.MLP([n_in, *hidden, n_out], leaky=leaky)


def block(dim, scale=True, scale_map="exp", split_mode="channel"):
    half = dim - dim // 2
    p, t = (half, dim - half) if split_mode == "channel" else (dim - half, half)
    return nf.flows.AffineCouplingBlock(mlp(p, 2 * t if scale else t, 0.01), scale, scale_map, split_mode)


def masked(dim, s=True, t=True, mask=None):
    if mask is None:
        mask = (torch.rand(dim) < 0.5).float()
        mask[torch.randperm(dim)[:2]] = torch.tensor([0.0, 1.0])
    nets = [mlp(dim, dim) if wanted else None for wanted in (t, s)]
    return nf.flows.MaskedAffineFlow(mask, *nets)


def initialized_actnorm(dim):
    layer = nf.flows.ActNorm(dim)
    layer.inverse(1 + 2 * torch.randn(50, dim))
    return layer


def diag(dim, trainable=True):
    base = nf.distributions.DiagGaussian(dim, trainable=trainable)
    with torch.no_grad():
        base.loc.normal_()
        base.log_scale.normal_(std=0.3)
    return base


LAYERS = {
    "exp": lambda dim: [block(dim), nf.flows.Permute(dim, "swap")],
    "sigmoid": lambda dim: [block(dim, scale_map="sigmoid"), nf.flows.Permute(dim, "shuffle")],
    "sigmoid_inv": lambda dim: [block(dim, scale_map="sigmoid_inv"), nf.flows.Permute(dim, "shuffle")],
    "channel_inv": lambda dim: [block(dim, split_mode="channel_inv"), block(dim)],
    "additive": lambda dim: [block(dim, scale=False), block(dim, scale=False, split_mode="channel_inv")],
    "masked": lambda dim: [masked(dim)],
    "masked without s": lambda dim: [masked(dim, s=False)],
    "masked without t": lambda dim: [masked(dim, t=False)],
    "masked alternating": lambda dim: [
        masked(dim, mask=torch.tensor([float(j % 2 == i % 2) for j in range(dim)])) for i in range(2)
    ],
    "actnorm": lambda dim: [initialized_actnorm(dim), block(dim)],
    "affine const": lambda dim: [nf.flows.AffineConstFlow((dim,)), block(dim)],
    "lu": lambda dim: [nf.flows.LULinearPermute(dim, identity_init=False), block(dim)],
    "invertible affine lu": lambda dim: [nf.flows.InvertibleAffine(dim, use_lu=True), block(dim)],
    "invertible affine": lambda dim: [nf.flows.InvertibleAffine(dim, use_lu=False), block(dim)],
    "composite": lambda dim: [block(dim), nf.flows.Permute(dim, "swap")],
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dim", [2, 5, 8])
def test_reading_is_the_flow(name, dim, check_reading, randomize):
    torch.manual_seed(dim)
    layers = [layer for _ in range(2) for layer in LAYERS[name](dim)]
    if name == "composite":
        layers = [layers[0], nf.flows.Composite(layers[1:])]
        flow = nf.NormalizingFlow(diag(dim), layers)
        randomize(flow)
        reading = read_flow(LIBRARY, flow)
        # Composite's own log-determinant is float32: compare with the same layers in a flat list.
        flow = nf.NormalizingFlow(flow.q0, [layers[0], *layers[1]._flows])
        check_reading(
            flow,
            type(reading)(reading.layers, (dim,), read_flow(LIBRARY, flow).log_prob, read_flow(LIBRARY, flow).inverse),
        )
        return
    flow = randomize(nf.NormalizingFlow(diag(dim), layers))
    reading = read_flow(LIBRARY, flow)
    assert not any(isinstance(layer, Kept) for layer in reading.layers)
    check_reading(flow, reading)


@pytest.mark.parametrize("mode", ["checkerboard", "checkerboard_inv"])
def test_checkerboard_on_vectors(mode, check_reading, randomize):
    torch.manual_seed(0)
    layers = [nf.flows.AffineCouplingBlock(mlp(4, 8), split_mode=mode), block(8)]
    flow = randomize(nf.NormalizingFlow(diag(8), layers))
    reading = read_flow(LIBRARY, flow)
    assert sum(isinstance(layer, Coupling) for layer in reading.layers) == 2
    check_reading(flow, reading)


def test_trained_checkpoint_is_loaded_before_it_is_read(tmp_path, check_reading):
    """Trained and saved by the library, loaded into a fresh flow, ActNorm and random permutations with it."""
    torch.manual_seed(1)

    def build():
        layers = [layer for _ in range(3) for layer in (block(5), initialized_actnorm(5), nf.flows.LULinearPermute(5))]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(5), layers)

    flow = build()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(20):
        loss = flow.forward_kld(torch.randn(64, 5).cumsum(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    flow.save(tmp_path / "flow.pt")
    loaded = build()
    loaded.load(tmp_path / "flow.pt")
    check_reading(loaded.double(), read_flow(LIBRARY, loaded))


def test_base_that_is_standard_and_fixed_leaves_no_layer():
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(4, trainable=False), [block(4)])
    assert [type(layer) for layer in read_flow(LIBRARY, flow).layers] == [Coupling]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [block(4)])
    assert [type(layer) for layer in read_flow(LIBRARY, flow).layers] == [Coupling, Diagonal]


def test_what_is_trained_is_known():
    flow = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(4, trainable=False), [block(4), nf.flows.LULinearPermute(4), masked(4)]
    )
    flow.flows[1].requires_grad_(False)
    flow.flows[0].flows[1].param_map.net[0].requires_grad_(False)
    coupling, permutation, dense, last = read_flow(LIBRARY, flow).layers
    assert isinstance(permutation, Permutation) and isinstance(dense, Dense) and not dense.trained
    assert (last.conditioner.roles[0] == FROZEN).all() and (last.conditioner.roles[1] == TRAINED).all()
    assert coupling.conditioner.separate and all((roles == TRAINED).all() for roles in coupling.conditioner.roles)


def test_splines_residuals_and_shared_networks_are_kept(check_reading, randomize):
    torch.manual_seed(2)
    shared = mlp(2, 4)
    layers = [
        block(4),
        nf.flows.CoupledRationalQuadraticSpline(4, 1, 8),
        nf.flows.AffineCouplingBlock(shared),
        nf.flows.AffineCouplingBlock(shared),
        nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4], output_fn="sigmoid")),
        block(4),
    ]
    flow = randomize(nf.NormalizingFlow(diag(4), layers))
    reading = read_flow(LIBRARY, flow)
    kinds = [type(layer) for layer in reading.layers]
    assert kinds == [Coupling, Kept, Kept, Kept, Kept, Coupling, Diagonal]
    reasons = [layer.reason for layer in reading.layers if isinstance(layer, Kept)]
    assert "flows.4" in reasons[0] and "Sigmoid" in reasons[0]
    assert "flows.3" in reasons[1] and "shares parameters" in reasons[1]
    assert "flows.1 (CoupledRationalQuadraticSpline)" in reasons[3]
    check_reading(flow, reading, tolerance=1e-7)


def test_conditional_flow_with_splines_keeps_the_context(check_reading, randomize):
    torch.manual_seed(3)
    layers = [
        nf.flows.LULinearPermute(5, identity_init=False),
        nf.flows.CoupledRationalQuadraticSpline(5, 1, 8, num_context_channels=3),
        nf.flows.InvertibleAffine(5),
    ]
    flow = randomize(nf.ConditionalNormalizingFlow(diag(5), layers))
    reading = read_flow(LIBRARY, flow)
    assert reading.context_shape == (3,)
    check_reading(flow, reading, tolerance=1e-7)


@pytest.mark.parametrize(
    ("layers", "base", "message"),
    [
        ([], nf.distributions.GaussianMixture(2, 4), "GaussianMixture"),
        ([], nf.distributions.DiagGaussian((4, 4)), r"on samples of shape \(4, 4\)"),
        ([nf.flows.ActNorm(4)], nf.distributions.DiagGaussian(4), "has not been initialised"),
        ([nf.flows.BatchNorm()], nf.distributions.DiagGaussian(4), r"BatchNorm.: it normalises"),
        ([nf.flows.Split(), nf.flows.Merge()], nf.distributions.DiagGaussian(4), "AffineCouplingBlock"),
    ],
)
def test_refusals_name_the_layer(layers, base, message):
    with pytest.raises(ConversionError, match=message):
        read_flow(LIBRARY, nf.NormalizingFlow(base, layers))


def test_refusals_of_whole_flows():
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [block(4)])
    flow.q0.temperature = 0.7
    with pytest.raises(ConversionError, match=r"temperature is 0\.7"):
        read_flow(LIBRARY, flow)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nf.flows.AffineCouplingBlock(nn.Linear(3, 4)), "0 hidden layers"),
        (lambda: nf.flows.AffineCouplingBlock(mlp(3, 6)), "3 columns to 6"),
        (lambda: nf.flows.AffineConstFlow((5,), shift=False), "only some of its parameters"),
        (lambda: nf.flows.MaskedAffineFlow(torch.tensor([0.5, 0.5, 0, 1, 1]), mlp(5, 5), mlp(5, 5)), "not one 0 or 1"),
        (lambda: nf.flows.MaskedAffineFlow(torch.zeros(5), mlp(5, 5), mlp(5, 5)), "leaves no column"),
        (
            lambda: nf.flows.MaskedAffineFlow(torch.eye(5)[0], mlp(5, 5), mlp(5, 5, 0.01)),
            "differ in depth or activation",
        ),
        (lambda: nf.flows.Planar((5,)), "no kernel covers"),
    ],
)
def test_reasons_of_layers_that_are_kept(layer, reason):
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(5, trainable=False), [layer()])
    (kept,) = read_flow(LIBRARY, flow).layers
    assert isinstance(kept, Kept) and reason in kept.reason and "flows.0" in kept.reason
