"""The flow layers that layers on images become."""

import nflows.transforms
import normflows as nf
import pytest
import torch

from glf_fast import ActNorm, FixedLinear, InvertibleLinear, Squeeze, convert
from glf_fast.conversion.images import OnChannels, on_channels
from glf_fast.conversion.layers import Dense, Diagonal, Permutation
from glf_fast.flow.folding import Product, folded

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # called by normflows


def glow(shape):
    base = nf.distributions.DiagGaussian(shape, trainable=False)
    flow = nf.NormalizingFlow(base, [nf.flows.GlowBlock(shape[0], 8, init_zeros=False) for _ in range(2)])
    flow.log_prob(torch.randn(9, *shape))
    return flow


@pytest.mark.parametrize("pixels", [(4, 6), (9, 10)])
def test_the_order_of_memory_stays(pixels):
    layers = convert(glow((4, *pixels)))
    x = torch.randn(3, 4, *pixels)
    last = x.to(memory_format=torch.channels_last)
    for direction in (layers, layers.inverse):
        assert direction(x)[0].is_contiguous()
        assert direction(last)[0].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(direction(x)[0], direction(last)[0], rtol=1e-4, atol=1e-4)


def test_images_of_other_sizes_than_it_was_made_for():
    """Nothing in the layers knows how many pixels there are."""
    original = glow((4, 4, 6)).double()
    layers = OnChannels(convert(original).layers)
    x = torch.randn(3, 4, 9, 8).double()
    z, logdet = original.inverse_and_log_det(x)
    torch.testing.assert_close(layers(x)[0], z)
    torch.testing.assert_close(layers(x)[1].float(), logdet)


def test_it_compiles_to_one_graph():
    flow = convert(glow((5, 8, 9)))
    x = torch.randn(4, 5, 8, 9)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow.log_prob(x))


def pieces(reach, *, trained):
    W = torch.randn(4, 4).double()
    shift = torch.full((4,), reach).double()
    return [Diagonal(torch.zeros(4).double(), shift, True), Dense(W, torch.zeros(4).double(), trained, regular=False)]


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_affine_becomes_one_product(trained):
    """But not what moves the data far: a matrix would have rounded them. Fixed matrices are inverted once."""
    near, far = (on_channels(pieces(reach, trained=trained), []) for reach in (1.0, 100.0))
    for layers in (near, far):
        assert [type(layer) for layer in layers] == [ActNorm, InvertibleLinear if trained else FixedLinear]
        run = OnChannels(layers)
        x = torch.randn(3, 4, 5, 2).double()
        z, logdet = run(x)
        back, back_logdet = run.inverse(z)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(back_logdet, -logdet)
    assert [type(step) for step in folded(near, inverse=False)] == [Product]
    assert [type(step) for step in folded(far, inverse=False)] == [ActNorm, Product]


def test_permutations_that_cancel_are_nothing():
    order = torch.tensor([2, 0, 1])
    assert not on_channels([Permutation(order), Permutation(order.argsort())], [])


@pytest.mark.parametrize("factor", [2, 3])
def test_a_squeeze_has_the_libraries_order(factor):
    x = torch.randn(2, 3, 6, 12)
    ours = Squeeze(factor)
    assert torch.equal(ours(x)[0], nflows.transforms.SqueezeTransform(factor)(x)[0])
    if factor == 2:
        assert torch.equal(ours(x)[0], nf.flows.Squeeze().inverse(x)[0])
