"""normflows on images, converted: every coupling, 1 × 1 convolution and base; multi-scale flows tools.accelerated in place."""

import copy

import normflows as nf
import pytest
import torch

from glf_fast import AffineCoupling, accelerate, convert
from glf_fast.conversion import ConversionError
from glf_fast.conversion.normflows import LIBRARY
from glf_fast.flow.folding import Product, folded

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # called by normflows


@pytest.fixture
def library(tools):
    def inverse(flow, z, context):
        if isinstance(flow, nf.MultiscaleFlow):
            pieces = z.flatten(1).split([int(torch.tensor(q0.shape).prod()) for q0 in reversed(flow.q0)], 1)
            return flow.forward_and_log_det([moved(q0, p) for q0, p in zip(flow.q0, reversed(pieces), strict=True)])[0]
        return flow(moved(flow.q0, z))

    def moved(base, z):
        z = z.reshape(-1, *base.shape)
        if isinstance(base, nf.distributions.GlowBase):
            mean, log_scale = (
                base.loc * torch.exp(3 * base.loc_logs),
                base.log_scale * torch.exp(3 * base.log_scale_logs),
            )
        else:
            mean, log_scale = base.loc, base.log_scale
        return mean + log_scale.exp() * z

    def log_prob(flow, x, context):
        return flow.log_prob(x, None) if isinstance(flow, nf.MultiscaleFlow) else flow.log_prob(x)

    return tools.Library(LIBRARY, log_prob, inverse)


def block(C, net, scale=True, scale_map="exp", split_mode="channel"):
    passive = C - C // 2 if split_mode == "channel" else C // 2
    outputs = (C - passive) * (2 if scale else 1)
    return nf.flows.AffineCouplingBlock(net(passive, outputs), scale, scale_map, split_mode)


STEPS = {
    "exp": lambda C, net: [block(C, net), nf.flows.Permute(C, "swap")],
    "sigmoid": lambda C, net: [block(C, net, scale_map="sigmoid"), nf.flows.Permute(C, "shuffle")],
    "sigmoid_inv": lambda C, net: [block(C, net, scale_map="sigmoid_inv"), nf.flows.Permute(C, "shuffle")],
    "both halves": lambda C, net: [block(C, net), block(C, net, split_mode="channel_inv")],
    "additive": lambda C, net: [block(C, net, scale=False), block(C, net, False, split_mode="channel_inv")],
    "Glow": lambda C, net: [nf.flows.GlowBlock(C, 6)],
    "Glow, free matrix": lambda C, net: [nf.flows.GlowBlock(C, 6, split_mode="channel_inv", use_lu=False, leaky=0.1)],
    "convolution": lambda C, net: [block(C, net), nf.flows.Invertible1x1Conv(C, True)],
    "constants": lambda C, net: [block(C, net, scale_map="sigmoid"), nf.flows.AffineConstFlow((C, 1, 1))],
}


def flow_of(step, shape, net, base=nf.distributions.DiagGaussian):
    layers = [layer for _ in range(3) for layer in STEPS[step](shape[0], net)]
    flow = nf.NormalizingFlow(base(shape), layers)
    flow.log_prob(1 + 2 * torch.randn(20, *shape))  # ActNorms start
    return flow


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4, 2), (5, 3, 5)])
@pytest.mark.parametrize("step", STEPS)
def test_every_layer(step, shape, library, tools):
    flow = tools.shake_images(flow_of(step, shape, tools.conv_net))
    converted = tools.prove(library, flow, shape)
    couplings = sum(isinstance(module, AffineCoupling) for module in converted.modules())
    assert couplings == (6 if step in ("both halves", "additive") else 3)
    if step.startswith("Glow"):  # ActNorm and convolution are one product
        steps = folded(converted.layers, inverse=False)
        assert [isinstance(step, Product) for step in steps[:6]] == [True, False] * 3


@pytest.mark.parametrize("base", ["glow", "fixed", "trained"])
def test_bases_and_squeezes(base, library, tools):
    """The noise is a squeezed image; ours has the data's shape."""
    kinds = {
        "glow": nf.distributions.GlowBase,
        "fixed": lambda shape: nf.distributions.DiagGaussian(shape, trainable=False),
        "trained": nf.distributions.DiagGaussian,
    }
    layers = [block(8, tools.conv_net), nf.flows.Squeeze(), nf.flows.GlowBlock(2, 6), nf.flows.Invertible1x1Conv(2)]
    flow = nf.NormalizingFlow(kinds[base]((8, 2, 3)), layers)
    flow.log_prob(torch.randn(20, 2, 4, 6))
    converted = tools.prove(library, tools.shake_images(flow), (2, 4, 6))
    assert converted.sample(3).shape == (3, 2, 4, 6)


def test_trained_checkpoint(library, tools):
    build = lambda: flow_of("Glow", (4, 4, 4), tools.conv_net)  # noqa: E731
    tools.prove(library, tools.trained(library, build, torch.randn(64, 4, 4, 4).cumsum(1)), (4, 4, 4))


def multiscale(class_cond, merge="channel"):
    """Two levels of two blocks on images (3, 16, 8)."""
    base = (
        (lambda shape: nf.distributions.ClassCondDiagGaussian(shape, 4))
        if class_cond
        else nf.distributions.GlowBase
    )  # fmt: skip
    flows = [
        [nf.flows.GlowBlock(C, 6, net_actnorm=class_cond) for _ in range(2)] + [nf.flows.Squeeze()] for C in (24, 12)
    ]
    merges = [nf.flows.Merge(merge)]
    return nf.MultiscaleFlow([base((24, 4, 2)), base((6, 8, 4))], flows, merges, class_cond=class_cond)


@pytest.mark.parametrize(("class_cond", "merge"), [(False, "channel"), (True, "channel_inv")])
def test_multiscale_in_place(class_cond, merge, tools):
    flow = multiscale(class_cond, merge)
    x, y = torch.randn(8, 3, 16, 8), torch.randint(4, (8,)) if class_cond else None
    flow.log_prob(x, y)
    flow, original, report = tools.accelerated(tools.shake(flow, 0.05))
    assert [(r.couplings, r.flows, r.into["affine"]) for r in report.replaced] == [(2, 2, 2), (2, 2, 2)]
    assert "2 AffineCoupling + 2 affine" in str(report) and "Squeeze" in str(report)
    assert type(flow) is nf.MultiscaleFlow and [len(level) for level in flow.flows] == [2, 2]
    wanted = original.log_prob(x.double(), y).float()
    torch.testing.assert_close(flow.log_prob(x, y), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(flow.forward_kld(x, y), -wanted.mean(), rtol=1e-4, atol=1e-3)
    latents, logdet = flow.inverse_and_log_det(x)
    for got, want in zip(latents, original.inverse_and_log_det(x.double())[0], strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)
    image, back = flow.forward_and_log_det(latents)
    torch.testing.assert_close(image, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back, -logdet, rtol=1e-4, atol=1e-3)
    assert flow.sample(3, y=None if y is None else y[:3])[0].shape == (3, 3, 16, 8)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    before = [p.clone() for p in flow.parameters()]
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = flow.forward_kld(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, q) for p, q in zip(flow.parameters(), before, strict=True))
    assert not accelerate(flow)  # fused before


@pytest.mark.parametrize("merge", ["channel", "channel_inv"])
def test_multiscale_converted(merge, library, tools):
    bases = nf.distributions.GlowBase((24, 2, 1)), nf.distributions.DiagGaussian((6, 4, 2))
    flows = [[nf.flows.GlowBlock(C, 4) for _ in range(2)] + [nf.flows.Squeeze()] for C in (24, 12)]
    flow = nf.MultiscaleFlow(bases, flows, [nf.flows.Merge(merge)], class_cond=False)
    flow.log_prob(torch.randn(20, 3, 8, 4), None)
    converted = tools.prove(library, tools.shake_images(flow), (3, 8, 4))
    assert [type(layer).__name__ for layer in converted.layers].count("Split") == 1
    assert converted.sample(2).shape == (2, 3, 8, 4)


def test_multiscale_before_its_actnorms_have_seen_data(tools):
    """The natural order: a fresh model, accelerate, then training. Each ActNorm stays, and gives one number for a batch."""
    flow = multiscale(False)
    for block in (m for m in flow.modules() if isinstance(m, nf.flows.GlowBlock)):
        for p in block.flows[0].parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    original = copy.deepcopy(flow)
    report = accelerate(flow)
    assert len(report.replaced) == 4 and str(report).count("an ActNorm has not been initialised") == 4
    x = torch.randn(8, 3, 16, 8)
    wanted = original.log_prob(x, None)  # starts the ActNorms of both by the same batch
    torch.testing.assert_close(flow.log_prob(x, None), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(flow.forward_kld(x), -wanted.mean(), rtol=1e-4, atol=1e-3)
    assert flow.sample(3)[0].shape == (3, 3, 16, 8)
    assert not accelerate(flow)  # what is between them was fused before
    torch.testing.assert_close(flow.log_prob(x, None), wanted, rtol=1e-4, atol=1e-3)


class Fixed(torch.nn.Module):
    """A network that only takes images of one size."""

    def __init__(self, n_in, n_out, pixels):
        super().__init__()
        self.layer, self.n_out = torch.nn.Linear(n_in * pixels, n_out * pixels), n_out

    def forward(self, x):
        return self.layer(x.flatten(1)).view(len(x), self.n_out, *x.shape[2:]).tanh()


def test_networks_of_one_size_are_compared_on_that(tools):
    flow = nf.NormalizingFlow(
        nf.distributions.DiagGaussian((2, 12, 10)), [block(2, lambda a, b: Fixed(a, b, 120)) for _ in range(2)]
    )
    x = torch.randn(5, 2, 12, 10)
    flow, original, report = tools.accelerated(flow)
    assert report.replaced[0].couplings == 2
    torch.testing.assert_close(flow.log_prob(x), original.log_prob(x.double()).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: multiscale(True), r"q0\.1 \(ClassCondDiagGaussian\): the base must be"),
        (lambda net: multiscale(False), "initialised"),
        (
            lambda net: multiscale(False, "checkerboard"),
            r"merges\.0 \(Merge\): mode 'checkerboard' does not join channels",
        ),
        (
            lambda net: nf.NormalizingFlow(nf.distributions.DiagGaussian((4, 2, 2)), [nf.flows.GlowBlock(4, 3)]),
            "initialised",
        ),
        (
            lambda net: nf.NormalizingFlow(nf.distributions.ClassCondDiagGaussian((4, 2, 2), 3), [block(4, net)]),
            r"q0 \(ClassCondDiagGaussian\)",
        ),
        (
            lambda net: nf.NormalizingFlow(nf.distributions.DiagGaussian((4, 2, 2)), [nf.flows.Permute(4)]),
            "no coupling or autoregressive layer that can be fused",
        ),
        (
            lambda net: nf.NormalizingFlow(
                nf.distributions.DiagGaussian((4, 2, 2)),
                [nf.flows.AffineCouplingBlock(net(4, 8), split_mode="checkerboard")],
            ),
            r"flows\.0 \(AffineCouplingBlock\): split_mode 'checkerboard' does not split channels",
        ),
    ],
)
def test_refusals(make, message, tools):
    with pytest.raises(ConversionError, match=message):
        convert(make(tools.conv_net))


def test_constants_for_each_pixel_stay(tools):
    layers = [block(4, tools.conv_net), nf.flows.AffineConstFlow((4, 3, 3)), block(4, tools.conv_net)]
    flow = tools.shake_images(nf.NormalizingFlow(nf.distributions.DiagGaussian((4, 3, 3)), layers))
    report = accelerate(copy.deepcopy(flow))
    assert [r.couplings for r in report.replaced] == [1, 1]
    assert "its shape (4, 3, 3) is not one number for each of 4 channels" in str(report)
