"""Affine layers between two couplings run as one product, and nothing else changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glf_fast import ActNorm, AffineCoupling, Flow, InvertibleLinear, SequentialFlow, Squeeze, backends
from glf_fast.flow.folding import Product, folded
from glf_fast.reference import log_normal

from .conftest import FLOWS, Case, conv, coupling_step


def layer_by_layer(flow: Flow) -> Flow:
    """A copy whose layers have hooks, and are applied one by one for that."""
    other = copy.deepcopy(flow)
    for module in other.modules():
        module.register_forward_hook(lambda *_: None)
    return other


@pytest.mark.parametrize("name", ["affine-runs", "glow-steps-large", "multiscale", "layers"])
def test_products_are_the_layers_one_by_one(name: str) -> None:
    flow = Case(name).flow.double()
    assert any(isinstance(step, Product) for step in folded(flow.layers, inverse=False))
    other = layer_by_layer(flow)
    assert not any(isinstance(step, Product) for step in folded(other.layers, inverse=False))
    x = torch.randn(4, *flow.event_shape, dtype=torch.float64, requires_grad=True)
    context = torch.randn(4, *flow.context_shape, dtype=torch.float64) if flow.context_shape else None
    for got, wanted in zip(flow(x, context), other(x, context), strict=True):
        torch.testing.assert_close(got, wanted)
    for got, wanted in zip(flow.inverse(x, context), other.inverse(x, context), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)
    for model in (flow, other):
        model.log_prob(x, context).sum().backward()
    for got, wanted in zip(flow.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-7, atol=1e-7)


def nodes(tensor: Tensor) -> int:
    """Nodes of the graph behind a tensor, without those of parameters."""
    found, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions]
    return sum(type(node).__name__ != "AccumulateGrad" for node in found)


@pytest.mark.skipif(not backends()["cpp"], reason="counted with the C++ kernels")
@pytest.mark.parametrize("mask", ["channels", [1, 0, 1, 0]])
def test_steps_of_glow_have_few_nodes(mask: Any) -> None:
    """13 for each further one: 5 of its network of three convolutions, 1 of the product, 7 of the coupling; 8 steps had 277."""

    def network(n_in: int, n_out: int) -> nn.Module:
        first, last = nn.Conv2d(n_in, 4, 3, padding=1), nn.Conv2d(4, n_out, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), last)

    def step(C: int) -> list[nn.Module]:
        return [ActNorm(C), InvertibleLinear(C), AffineCoupling(C, network(C // 2, C), mask=mask)]

    x = torch.randn(2, 4, 8, 8)
    counts = []
    for K in (4, 8):
        flow = SequentialFlow([layer for _ in range(K) for layer in step(4)], (4, 8, 8))
        flow.log_prob(x)
        counts.append(nodes(flow.log_prob(x)))
    # The other mask adds three gathers, and at the end one permutation of channels in channels_last order: five nodes more than
    # of contiguous planes (two movedims, two views, and the copy into the order of x), but that is faster.
    assert counts[1] <= (124 if mask == "channels" else 132) and counts[1] - counts[0] <= 4 * 13, counts


def test_a_first_batch_starts_the_actnorms_one_after_the_other() -> None:
    torch.manual_seed(0)
    flow = SequentialFlow([*coupling_step(4), *coupling_step(4)], (4, 8, 8))
    other = layer_by_layer(flow)
    x = 1 + 2 * torch.randn(9, 4, 8, 8)
    for got, wanted in zip(flow(x), other(x), strict=True):
        assert torch.equal(got, wanted)
    for (name, got), wanted in zip(flow.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(got, wanted), name
    z = flow(x)[0]
    torch.testing.assert_close(z, other(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (5, 3, 4)], ids=["vectors", "images"])
def test_an_actnorm_that_moves_data_far_keeps_its_digits(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    flow = SequentialFlow([ActNorm(5), InvertibleLinear(5), ActNorm(5), InvertibleLinear(5)], shape)
    x = 1e4 + torch.randn(50, *shape)
    flow(x)
    assert [type(step) for step in folded(flow.layers, inverse=False)] == [ActNorm, Product]
    loaded = SequentialFlow([ActNorm(5), InvertibleLinear(5), ActNorm(5), InvertibleLinear(5)], shape)
    loaded.load_state_dict(flow.state_dict())
    exact = copy.deepcopy(flow).double()(x.double())[0]
    for model in (flow, loaded):
        assert (model(x)[0] - exact).norm() < 1e-6 * exact.norm()


class Shuffle(InvertibleLinear):
    """A subclass, which may do something else."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x, context)
        return -z, logdet


def test_subclasses_are_applied_as_they_are() -> None:
    flow = SequentialFlow([ActNorm(4), Shuffle(4)], (4,)).eval()
    x = torch.randn(3, 4)
    assert torch.equal(flow(x)[0], flow.layers[1](flow.layers[0](x)[0])[0])


def test_a_width_that_does_not_fit_is_named() -> None:
    flow = SequentialFlow([ActNorm(5), InvertibleLinear(4)], (5, 2, 2)).eval()
    with pytest.raises(ValueError, match=r"x must have shape \(batch, dim, …\) = \(any, 4, any, any\)"):
        flow(torch.randn(3, 5, 2, 2))


class Contiguous(nn.Module):
    """A layer of somebody's that wants its images as they came."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.view(len(x), -1).view(x.shape), x.new_zeros(len(x))

    inverse = forward


@pytest.mark.parametrize("pixels", [(1, 3), (4, 6), (9, 10)])
@pytest.mark.parametrize("make", [lambda: nn.Identity(), Contiguous], ids=["ours", "with a layer of another kind"])
def test_the_order_of_memory_stays(pixels: tuple[int, int], make: Callable[[], nn.Module]) -> None:
    between = [] if isinstance(make(), nn.Identity) else [make()]
    flow = SequentialFlow([*coupling_step(4), *between, *coupling_step(4)], (4, *pixels)).eval()
    x = torch.randn(3, 4, *pixels, requires_grad=True)
    for direction in (flow, flow.inverse):
        z, logdet = direction(x)
        assert z.is_contiguous()
        assert torch.autograd.grad(z.sum() + logdet.sum(), x)[0].is_contiguous()
    if not between:
        last = x.to(memory_format=torch.channels_last)
        for direction in (flow, flow.inverse):
            assert direction(last)[0].is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(direction(x)[0], direction(last)[0], rtol=1e-4, atol=1e-4)


def test_scales_are_packed_in_the_order_in_which_they_leave() -> None:
    flow: SequentialFlow = FLOWS["multiscale"]()  # type: ignore[assignment]
    flow.eval()
    x = torch.randn(3, 1, 8, 4)
    first, squeeze, *step, split, second_squeeze, fixed, second_split = flow.layers[:9]
    h = x
    for layer in (first, squeeze, *step, split):
        h = layer(h)[0]
    h, z1 = h.chunk(2, 1)
    for layer in (second_squeeze, fixed, second_split):
        h = layer(h)[0]
    h, z2 = h.chunk(2, 1)
    for layer in flow.layers[9:]:
        h = layer(h)[0]
    z = torch.cat([z1.flatten(1), z2.flatten(1), h.flatten(1)], 1)
    torch.testing.assert_close(flow(x)[0].flatten(1), z)
    torch.testing.assert_close(flow.log_prob(x), log_normal(z) + flow(x)[1])


def test_sides_that_cannot_be_squeezed_are_named() -> None:
    with pytest.raises(ValueError, match=r"sides are multiples of 2; got \(4, 3, 2\)"):
        SequentialFlow([AffineCoupling(1, conv(1, 2), mask="checkerboard"), Squeeze(), Squeeze()], (1, 6, 4))
