"""nflows on images, converted: couplings with any mask and network, 1 × 1 convolutions, contexts, scales."""

import copy

import nflows.distributions
import nflows.transforms as nt
import pytest
import torch
from nflows.flows import Flow
from nflows.nn.nets import ConvResidualNet
from torch import nn

from glf_fast import AffineCoupling, accelerate, convert
from glf_fast.conversion import ConversionError
from glf_fast.conversion.nflows import LIBRARY


@pytest.fixture
def library(tools):
    def inverse(flow, z, context):
        embedded = None if context is None else flow._embedding_net(context)
        return flow._transform.inverse(z.reshape(-1, *flow._distribution._shape), embedded)[0]

    return tools.Library(LIBRARY, lambda flow, x, context: flow.log_prob(x, context), inverse)


def coupling(C, net=None, kind="Affine"):
    mask = torch.ones(C)
    mask[torch.randperm(C)[: max(1, C // 3)]] = -1
    return getattr(nt, f"{kind}CouplingTransform")(mask, net or residual)


def residual(n_in, n_out, **options):
    return ConvResidualNet(n_in, n_out, 5, num_blocks=1, **options)


def flow_of(shape, *layers, noise=None, embedding=None):
    noise = shape if noise is None else noise
    return Flow(nt.CompositeTransform(list(layers)), nflows.distributions.StandardNormal(noise), embedding)


def started(flow, shape, *context):
    """ActNorms have seen a batch."""
    flow.train().log_prob(1 + 2 * torch.randn(20, *shape), *context)
    return flow


STEPS = {
    "masks": lambda C: [coupling(C), coupling(C)],
    "alternating": lambda C: [
        nt.AffineCouplingTransform((torch.arange(C) + k) % 2, residual) for k in range(2)
    ],
    "additive": lambda C: [coupling(C, kind="Additive"), nt.ReversePermutation(C)],
    "Glow": lambda C: [nt.ActNorm(C), nt.OneByOneConvolution(C), coupling(C)],
    "inverse": lambda C: [
        nt.InverseTransform(nt.CompositeTransform([coupling(C), nt.OneByOneConvolution(C, identity_init=False)]))
    ],
    "pointwise": lambda C: [nt.PointwiseAffineTransform(0.5, 2.0), coupling(C), nt.RandomPermutation(C)],
}  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4, 2), (5, 3, 5)])
@pytest.mark.parametrize("step", STEPS)
def test_every_layer(step, shape, library, tools):
    flow = tools.shake_images(
        started(flow_of(shape, *(layer for _ in range(2) for layer in STEPS[step](shape[0]))), shape)
    )
    converted = tools.prove(library, flow, shape)
    kinds = {type(layer).__name__ for layer in converted.layers}
    assert "AffineCoupling" in kinds and kinds <= {"ActNorm", "AffineCoupling", "FixedLinear", "InvertibleLinear"}


def test_squeezes_stay(library, tools):
    C = 3
    layers = [*STEPS["Glow"](C), nt.SqueezeTransform(), *STEPS["Glow"](4 * C), nt.SqueezeTransform(factor=3)]
    flow = tools.shake_images(started(flow_of((C, 6, 12), *layers, noise=(36 * C, 1, 2)), (C, 6, 12)))
    assert tools.prove(library, flow, (C, 6, 12)).sample(2).shape == (2, C, 6, 12)


def test_contexts_that_are_images(library, tools):
    net = lambda n_in, n_out: residual(n_in, n_out, context_channels=2)  # noqa: E731
    flow = flow_of((4, 3, 5), *(layer for _ in range(2) for layer in (coupling(4, net), nt.OneByOneConvolution(4))))
    converted = tools.prove(library, tools.shake_images(flow), (4, 3, 5), (2, 3, 5))
    context = torch.randn(3, 2, 3, 5)
    p = converted.distribution(context)
    assert p.sample((6,)).shape == (6, 3, 4, 3, 5) and p.log_prob(torch.randn(3, 4, 3, 5)).shape == (3,)


class Conditioned(nn.Module):
    """A network with a use of its own for vectors of context."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.body, self.head = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Linear(3, n_out)

    def forward(self, x, context):
        return (self.body(x) + self.head(context)[:, :, None, None]).tanh()


def test_contexts_and_embeddings_of_any_kind():
    """An example says what no layer says; in accelerate the layer stays."""
    flow = flow_of((4, 3, 5), coupling(4, Conditioned), coupling(4, Conditioned), embedding=nn.Linear(2, 3))
    x, context = torch.randn(6, 4, 3, 5), torch.randn(6, 2)
    with pytest.raises(ConversionError, match="context"):
        convert(flow)
    converted = convert(flow, context=context)
    torch.testing.assert_close(converted.log_prob(x, context), flow.log_prob(x, context), rtol=1e-4, atol=1e-4)
    before = flow.log_prob(x, context)
    report = accelerate(flow)
    assert not report and "fails on random inputs" in str(report)
    assert torch.equal(flow.log_prob(x, context), before)


class Optional(nn.Module):
    """A network that makes something of a context if there is one."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.body = nn.Conv2d(n_in, n_out, 3, padding=1)

    def forward(self, x, context=None):
        return self.body(x) if context is None else self.body(x) + context[:, :1]


def test_contexts_reach_networks_that_nobody_knows_to_take_them(tools):
    flow, original, report = tools.accelerated(flow_of((4, 3, 5), coupling(4, Optional), nt.OneByOneConvolution(4)))
    assert report
    x, context = torch.randn(6, 4, 3, 5), torch.randn(6, 1, 3, 5)
    for given in (None, context):
        wanted = original.log_prob(x.double(), None if given is None else given.double()).float()
        torch.testing.assert_close(flow.log_prob(x, given), wanted, rtol=1e-4, atol=1e-4)


def test_convolutions_without_a_coupling(tools):
    """Replaced, because nflows' own take longer."""
    spline = nt.PiecewiseRationalQuadraticCDF((4, 3, 3), num_bins=3, tails="linear", tail_bound=9.0)
    layers = [nt.OneByOneConvolution(4), nt.RandomPermutation(4), spline, nt.ReversePermutation(4)]
    flow, original, report = tools.accelerated(tools.shake_images(flow_of((4, 3, 3), *layers)))
    assert [(r.couplings, r.flows, r.into["affine"]) for r in report.replaced] == [(0, 0, 1)]
    assert "  0           1 affine\n" in str(report)
    x = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(flow.log_prob(x), original.log_prob(x.double()).float(), rtol=1e-4, atol=1e-4)
    assert len(flow._transform._transforms) == 3


def multiscale():
    scales = nt.MultiscaleCompositeTransform(2)
    net = lambda n_in, n_out: residual(n_in, n_out, use_batch_norm=True)  # noqa: E731
    for C, shape in ((12, (12, 6, 12)), (24, (24, 3, 6))):
        steps = [layer for _ in range(2) for layer in (nt.ActNorm(C), nt.OneByOneConvolution(C), coupling(C, net))]
        scales.add_transform(nt.CompositeTransform([nt.SqueezeTransform(), *steps]), shape)
    return Flow(scales, nflows.distributions.StandardNormal([3 * 12 * 24]))


def test_multiscale_in_place(tools):
    x = torch.randn(7, 3, 12, 24)
    flow = tools.shake(started(multiscale(), x.shape[1:]), 0.02).eval()
    norms = [module for module in flow.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].train()
    flow, original, report = tools.accelerated(flow)
    assert [(r.couplings, r.into["AffineCoupling"]) for r in report.replaced] == [(2, 2)] * 2
    assert {id(m) for m in flow.modules()} >= {id(m) for m in norms} and norms[0].training and not norms[1].training
    norms[0].eval()
    original.eval()
    torch.testing.assert_close(flow.log_prob(x), original.log_prob(x.double()).float(), rtol=1e-4, atol=1e-3)
    noise, wanted = flow.transform_to_noise(x), original.transform_to_noise(x.double()).float()
    torch.testing.assert_close(noise, wanted, rtol=1e-4, atol=1e-4)
    assert flow.sample(3).shape == (3, 3, 12, 24)
    flow.train(), original.train()  # batch statistics, as before
    torch.testing.assert_close(flow.log_prob(x), original.log_prob(x.double()).float(), rtol=1e-4, atol=1e-3)
    (-flow.log_prob(x).mean()).backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_multiscale_converted(library, tools):
    scales, shape = nt.MultiscaleCompositeTransform(2), (3, 4, 4)
    for _ in range(2):
        C, H, W = 4 * shape[0], shape[1] // 2, shape[2] // 2
        steps = [layer for _ in range(2) for layer in STEPS["Glow"](C)]
        shape = scales.add_transform(nt.CompositeTransform([nt.SqueezeTransform(), *steps]), (C, H, W))
    flow = started(Flow(scales, nflows.distributions.StandardNormal([48])), (3, 4, 4))
    converted = tools.prove(library, tools.shake_images(flow), (3, 4, 4))
    assert [type(layer).__name__ for layer in converted.layers].count("Split") == 1
    x = torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(converted(x)[0].flatten(1), flow.transform_to_noise(x), rtol=1e-3, atol=1e-3)


def test_a_layer_before_the_scales(tools):
    inner = multiscale()
    preprocess = nt.CompositeTransform([nt.OneByOneConvolution(3), coupling(3), inner._transform])
    flow = tools.shake(Flow(preprocess, inner._distribution), 0.02)
    x = torch.randn(7, 3, 12, 24)
    flow, original, report = tools.accelerated(started(flow, x.shape[1:]).eval())
    assert [r.couplings for r in report.replaced] == [1, 2, 2]
    torch.testing.assert_close(flow.log_prob(x), original.eval().log_prob(x.double()).float(), rtol=1e-4, atol=1e-3)


def test_trained_checkpoint(library, tools):
    build = lambda: flow_of((4, 4, 4), *(layer for _ in range(2) for layer in STEPS["Glow"](4)))  # noqa: E731
    tools.prove(library, tools.trained(library, build, torch.randn(64, 4, 4, 4).cumsum(1)), (4, 4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (multiscale, "ActNorm has not been initialised"),
        (
            lambda: Flow(
                nt.CompositeTransform([nt.OneByOneConvolution(3), multiscale()._transform]),
                nflows.distributions.StandardNormal([3 * 12 * 24]),
            ),
            "MultiscaleCompositeTransform is converted alone.*accelerate",
        ),
        (lambda: flow_of((4, 2, 3), nt.ActNorm(4), coupling(4)), "ActNorm has not been initialised"),
        (lambda: flow_of((4, 2, 3), nt.OneByOneConvolution(4)), "no coupling"),
        (
            lambda: Flow(coupling(4), nflows.distributions.ConditionalDiagonalNormal([4, 2, 3])),
            "ConditionalDiagonalNormal: on images, StandardNormal",
        ),
        (lambda: flow_of((4, 2, 3), nt.AffineCouplingTransform([1, 1, 1, 1], lambda a, b: nn.Identity())), "its mask"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConversionError, match=message):
        convert(make())


def test_splines_stay_between(library, tools):
    """And a coupling that shares its network with another one."""
    spline = nt.PiecewiseRationalQuadraticCDF((4, 3, 3), num_bins=3, tails="linear", tail_bound=9.0)
    flow = tools.shake_images(flow_of((4, 3, 3), coupling(4), spline, coupling(4)))
    converted = convert(flow)
    assert sum(isinstance(module, AffineCoupling) for module in converted.modules()) == 2
    x = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(converted.log_prob(x), flow.log_prob(x), rtol=1e-4, atol=1e-3)
    first, second = coupling(4), coupling(4)
    second.transform_net = first.transform_net
    shared = flow_of((4, 3, 3), first, second)
    report = accelerate(copy.deepcopy(shared))
    assert not report and "shares parameters" in str(report)
