"""Layers of which flows on images are built: what they compute, and what they refuse."""

import pytest
import torch
from torch import nn

from glf_fast import MLP, AffineCoupling, CouplingFlow, FixedLinear, InvertibleLinear, SequentialFlow, Split, Squeeze

from .conftest import conv


def test_orders_of_a_squeeze() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    channels, pixels = Squeeze()(x)[0], Squeeze(order="pixels")(x)[0]
    assert torch.equal(channels, nn.functional.pixel_unshuffle(x, 2))
    assert torch.equal(pixels, torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1))
    for order in ("channels", "pixels"):
        last = Squeeze(order=order)(x.to(memory_format=torch.channels_last))[0]
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, channels if order == "channels" else pixels)
        assert Squeeze(order=order).inverse(last)[0].is_contiguous(memory_format=torch.channels_last)


def test_a_split_has_a_normal_prior_given_what_goes_on() -> None:
    torch.manual_seed(0)
    split = Split(4, log_scale="exp", context_dim=3)
    x, context = torch.randn(5, 4, 3, 2), torch.randn(5, 3)
    assert torch.equal(split(x, context)[0], x), "it starts as N(0, I)"
    assert split.prior is not None
    nn.init.normal_(split.prior.conditioner.weight, std=0.3)  # type: ignore[arg-type]
    p, v = x.chunk(2, 1)
    log_std, mean = split.prior.conditioner(torch.cat([p, context[:, :, None, None].expand(-1, -1, 3, 2)], 1)).chunk(
        2, 1
    )
    normal = torch.distributions.Normal(0.0, 1.0)
    wanted = torch.distributions.Normal(mean, log_std.exp()).log_prob(v).flatten(1).sum(1)
    wanted += normal.log_prob(p).flatten(1).sum(1)
    flow = SequentialFlow([split], (4, 3, 2), 3)
    torch.testing.assert_close(flow.log_prob(x, context), wanted)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 3, 5), (2, 1, 1)])
def test_a_checkerboard_shows_the_network_one_colour_and_changes_the_other(shape: tuple[int, ...], even: bool) -> None:
    torch.manual_seed(0)
    coupling = AffineCoupling(2, conv(2, 4), mask="checkerboard", flip=even)
    seen: list[torch.Tensor] = []
    coupling.conditioner.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    x = torch.randn(3, *shape)
    colour = (torch.arange(shape[1])[:, None] + torch.arange(shape[2])) % 2 == (0 if even else 1)
    z, logdet = coupling(x)
    assert torch.equal(seen[0], x.masked_fill(colour, 0))
    assert torch.equal(z[:, :, ~colour], x[:, :, ~colour])
    u, t = coupling.conditioner(seen[0]).chunk(2, 1)
    log_scale = 2 * torch.tanh(u / 2)
    torch.testing.assert_close(z[:, :, colour], (x * log_scale.exp() + t)[:, :, colour])
    torch.testing.assert_close(logdet, log_scale[:, :, colour].flatten(1).sum(1))


def test_a_given_permutation_is_that() -> None:
    layer = InvertibleLinear(4, linear="permutation", permutation=range(4)[::-1])
    x = torch.randn(2, 4)
    assert torch.equal(layer(x)[0], x.flip(1))


def test_a_fixed_matrix_is_inverted_in_the_precision_that_it_is_used_in() -> None:
    layer = FixedLinear(torch.randn(5, 5)).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AffineCoupling(3, conv(2, 2), mask=[True, False]), "mask must be 3 booleans"),
        (lambda: AffineCoupling(2, conv(2, 2), mask=[True, True]), "some True and some False"),
        (lambda: AffineCoupling(2, conv(1, 2), mask="stripes"), "'stripes'"),
        (lambda: AffineCoupling(1, conv(1, 2)), "at least two channels"),
        (lambda: AffineCoupling(2, MLP(2, [3], 4), mask="checkerboard")(torch.zeros(1, 2)), "needs images"),
        (lambda: AffineCoupling(2, conv(2, 2), mask="checkerboard")(torch.zeros(1, 2, 2, 2)), r"\(1, 4, 2, 2\)"),
        (lambda: Squeeze(1), "factor must be ≥ 2"),
        (lambda: Squeeze(order="rows"), "order must be one of 'channels', 'pixels'"),
        (lambda: Squeeze()(torch.zeros(1, 1, 3, 2)), r"multiples of 2; got \(1, 3, 2\)"),
        (lambda: Squeeze().inverse(torch.zeros(1, 2, 3, 2)), "a multiple of 4"),
        (lambda: Split(1), "at least two channels"),
        (lambda: Split(4, learned=False, context_dim=2), "takes no context"),
        (lambda: Split(4, context_dim=2)(torch.zeros(1, 4, 2, 2)), "give a context of 2"),
        (
            lambda: Split(4)(torch.zeros(1, 5, 2, 2)),
            r"split of 4 channels needs x of shape \(4, height, width\) .* \(5, 2, 2\)",
        ),
        (lambda: Split(4)(torch.zeros(1, 4)), r"needs x of shape \(4, height, width\) per sample; got \(4,\)"),
        (
            lambda: Split(4, learned=False).inverse(torch.zeros(1, 3)),
            r"needs z of shape \(4, …\) per sample; got \(3,\)",
        ),
        (
            lambda: Split(4, context_dim=2)(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3)),
            r"context must have shape \(1, 2\) or \(1, 2, 2, 2\); got \(1, 3\)",
        ),
        (lambda: SequentialFlow([Squeeze(), Split(6)], (1, 4, 4)), r"a split of 6 channels needs .* got \(4, 2, 2\)"),
        (lambda: SequentialFlow([Split(4)], (4,)), r"a split of 4 channels needs .* got \(4,\)"),
        (lambda: Squeeze()(torch.zeros(1, 4)), r"needs images .* got \(4,\)"),
        (lambda: FixedLinear(torch.zeros(2, 3)), r"square matrix \(dim, dim\); got \(2, 3\)"),
        (lambda: InvertibleLinear(3, linear="permutation", permutation=[0, 0, 1]), "each of 0 … 2 once"),
        (lambda: InvertibleLinear(3, permutation=[0, 2, 1]), "linear='plu'"),
        (
            lambda: CouplingFlow.from_layers(
                SequentialFlow([InvertibleLinear(4), AffineCoupling(4, MLP(2, [3], 4), undo=True)], (4,))
            ),
            "layer 1 has undo=True",
        ),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
