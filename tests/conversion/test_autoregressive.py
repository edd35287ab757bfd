"""Masked autoregressive layers of nflows and normflows, converted: orders, masks, contexts, training, refusals."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import normflows as nf
import pytest
import torch
import zuko
from nflows import transforms as T
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms.made import MaskedLinear
from torch import Tensor, nn
from torch.nn import functional as F

from glf_fast import AutoregressiveFlow, accelerate
from glf_fast.conversion import ConversionError, convert, nflows, normflows
from glf_fast.conversion.degrees import degrees
from glf_fast.conversion.layers import Unfusable
from glf_fast.reference.made import fan_in

Make = Callable[[int, int], nn.Module]


def of_nflows(*, kind: type = T.MaskedAffineAutoregressiveTransform, inverse: bool = False, **options: Any) -> Make:
    """Three layers, each with a random permutation behind it, as sbi has them."""

    def make(dim: int, context: int) -> nn.Module:
        given = {"hidden_features": 13, "context_features": context or None, "activation": torch.tanh} | options
        layers = [layer for _ in range(3) for layer in (kind(dim, **given), T.RandomPermutation(dim))]
        return Flow(T.CompositeTransform(map(T.InverseTransform, layers) if inverse else layers), StandardNormal([dim]))

    return make


def of_normflows(layer: Callable[[int], nn.Module]) -> Make:
    def make(dim: int, context: int) -> nn.Module:
        layers = [layer(dim) for _ in range(3)]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)

    return make


def pruned(flow: nn.Module) -> nn.Module:
    """Masks that no degrees give: every third weight that was allowed is not."""
    for layer in flow.modules():
        if isinstance(layer, MaskedLinear):
            layer.mask.flatten()[::3] = 0
    return flow


PLAIN: dict[str, Any] = {"use_residual_blocks": False}
SPLINES: dict[str, Any] = {
    "kind": T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    "num_bins": 5,
    "tails": "linear",
}
# Flow, dimension, columns of the context → what comes out, see `outline_of`.
CASES: dict[str, tuple[Make, int, int, str]] = {
    "plain": (of_nflows(**PLAIN), 10, 4, "a3"),
    "one feature": (of_nflows(**PLAIN), 1, 2, "a3"),
    "one layer, random masks": (of_nflows(num_blocks=0, random_mask=True, **PLAIN), 6, 0, "a3"),
    "few units, random masks": (
        of_nflows(num_blocks=3, hidden_features=4, random_mask=True, activation=F.elu, **PLAIN), 6, 1, "a3",
    ),
    "masks without degrees": (lambda d, c: pruned(of_nflows(**PLAIN)(d, c)), 6, 2, "a3"),
    "residual": (of_nflows(activation=F.relu), 6, 2, "a3"),
    "residual, another slope": (of_nflows(activation=partial(F.leaky_relu, negative_slope=0.2)), 3, 0, "a3"),
    "six layers, softplus": (of_nflows(num_blocks=5, activation=F.softplus, **PLAIN), 4, 1, "a3"),
    "residual, masks without degrees": (lambda d, c: pruned(of_nflows(num_blocks=1)(d, c)), 4, 0, "a3"),
    "inverse": (of_nflows(inverse=True, **PLAIN), 4, 2, "a3"),
    "splines": (of_nflows(tail_bound=3.0, **PLAIN, **SPLINES), 4, 2, "a3"),
    "splines, residual": (of_nflows(**SPLINES), 2, 0, "a3"),
    "normflows": (of_normflows(lambda d: nf.flows.MaskedAffineAutoregressive(d, 12)), 6, 0, "a3"),
    "normflows splines": (
        of_normflows(lambda d: nf.flows.AutoregressiveRationalQuadraticSpline(d, 2, 12, permute_mask=True)), 4, 0, "a3",
    ),
}  # fmt: skip


# Two biases of each block are one.
OTHER_STEPS = ["residual"]


def library(tools, name: str):
    if name.startswith("normflows"):
        return tools.Library(normflows.LIBRARY, lambda f, x, c: f.log_prob(x), lambda f, z, c: f.forward(z))
    return tools.Library(
        nflows.LIBRARY, lambda f, x, c: f.log_prob(x, c), lambda f, z, c: f._transform.inverse(z, c)[0]
    )


def losses(flow: nn.Module, optimizer: type, rate: float, x: Tensor, context: Tensor | None) -> Tensor:
    steps = optimizer([p for p in flow.parameters() if p.requires_grad], rate)
    found = []
    for batch in x:
        loss = -(flow.log_prob(batch) if context is None else flow.log_prob(batch, context)).mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("name", CASES)
def test_every_kind(tools, name: str) -> None:
    make, dim, columns, outline = CASES[name]
    flow = tools.shake(make(dim, columns))
    converted = tools.prove(library(tools, name), flow, dim, columns, outline)
    x, context = torch.randn(5, 16, dim).double(), torch.randn(16, columns).double() if columns else None
    for optimizer, rate in ((torch.optim.Adam, 1e-2), (torch.optim.SGD, 1e-3)):
        wanted, got = (losses(copy.deepcopy(f).double(), optimizer, rate, x, context) for f in (flow, converted))
        difference = (got - wanted).abs().max().item()
        assert (difference > 1e-6) if name in OTHER_STEPS else (difference < 1e-8 * wanted.abs().max()), optimizer


def test_the_report_names_layers_with_other_steps(tools) -> None:
    for name, other in (("plain", False), *((name, True) for name in OTHER_STEPS)):
        assert ("trains other parameters for MaskedAffine" in str(accelerate(CASES[name][0](3, 1)))) == other


def test_degrees_of_usual_masks_need_no_frozen_weights() -> None:
    converted = convert(of_nflows(**PLAIN)(6, 2)).layers[0]
    assert isinstance(converted, AutoregressiveFlow) and not converted.held and converted.config["degrees"] is None
    random = convert(of_nflows(random_mask=True, **PLAIN)(6, 2)).layers[0]
    assert not random.held and random.config["degrees"] is not None


REFUSED: dict[str, Make] = {
    "with batch norm is not covered": of_nflows(use_batch_norm=True),
    r"dropout \(p = 0.2\) is active; convert the flow in eval mode": of_nflows(dropout_probability=0.2, **PLAIN),
    "the activation 'celu' is not covered": of_nflows(activation=F.celu),
    "its network has 9 hidden layers; zero to eight": of_nflows(num_blocks=8, **PLAIN),
    "no activation behind the first layer": of_nflows(num_blocks=0),
    "linear tails of one bound are covered": of_normflows(
        lambda d: nf.flows.CircularAutoregressiveRationalQuadraticSpline(d, 2, 12, [1])
    ),
    "its network has no activation behind": of_normflows(
        lambda d: nf.flows.MaskedAffineAutoregressive(d, 12, use_residual_blocks=False)
    ),
    "the context gates the blocks": of_normflows(
        lambda d: nf.flows.MaskedAffineAutoregressive(d, 12, context_features=2)
    ),
    "one of them depends on itself": lambda d, c: _with_a_cycle(of_nflows(**PLAIN)(d, c)),
}


def _with_a_cycle(flow: nn.Module) -> nn.Module:
    for layer in flow.modules():
        if isinstance(layer, MaskedLinear):
            layer.mask.fill_(1)
    return flow


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        convert(REFUSED[reason](4, 0))


@pytest.mark.parametrize("trained", ["context_layer", "linear_layers.0.bias", "final_layer", "initial_layer.weight"])
def test_some_of_a_network_is_trained(trained: str) -> None:
    flow = of_nflows()(3, 2)
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_(trained in name)
    x, context = torch.randn(1, 16, 3).double(), torch.randn(16, 2).double()
    converted = convert(flow).double()
    assert any(parameter.requires_grad for parameter in converted.parameters())
    wanted, got = (losses(f, torch.optim.SGD, 1e-3, x.expand(3, -1, -1), context) for f in (flow.double(), converted))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# A class of the network's parts, whose objects get a subclass → the flow.
NETWORKS: dict[str, Make] = {
    "MADE": of_nflows(),
    "MaskedLinear": of_nflows(),
    "MaskedResidualBlock": of_nflows(),
    "MaskedFeedforwardBlock": of_nflows(**PLAIN),
    "Linear": of_nflows(),
    "MaskedMLP": lambda d, c: zuko.flows.MAF(d, c, hidden_features=(9,)),
    "Residual": lambda d, c: zuko.flows.MAF(d, c, hidden_features=(9,), residual=True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_methods_of_their_own_stay(tools, name: str) -> None:
    """A comparison in evaluation mode does not show what they do in training mode alone."""
    flow = NETWORKS[name](3, 2)
    convert(flow)
    with pytest.raises(ConversionError, match=r"Dropping has its own forward"):
        convert(tools.dropping(flow, name).eval())


def test_a_forward_of_one_object_stays() -> None:
    flow = of_nflows()(3, 0)
    network = flow._transform._transforms[0].autoregressive_net
    network.forward = lambda x, context=None: type(network).forward(network, x, context)
    report = accelerate(flow)
    assert "a forward that is not its class's" in str(report) and report.replaced[0].couplings == 2


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("seed", range(10))
def test_degrees_allow_what_any_masks_without_a_cycle_allow(seed: int, blocks: int) -> None:
    """Layers that are made of random degrees give exactly these; random masks give no less."""
    generator = torch.Generator().manual_seed(seed)
    dim, layers = 1 + seed % 7, 1 + 2 * blocks if blocks else 1 + seed % 3

    def draw(low: int, high: int, n: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    features = torch.randperm(dim, generator=generator) + 1
    stream = draw(0, dim + 1, 6)
    hidden = [stream if blocks and k % 2 == 0 else draw(0, dim + 1, 6) for k in range(layers)]
    exact = [after[:, None] >= before for before, after in zip([features, *hidden], hidden, strict=False)]
    exact.append(features[:, None] > hidden[-1])
    for masks in (exact, [mask & (torch.rand(mask.shape, generator=generator) < 0.7) for mask in exact]):
        found = degrees(masks, blocks)
        allowed = [after[:, None] >= before for before, after in itertools.pairwise(found)]
        allowed.append(found[0][:, None] > found[-1])
        for mask, of_degrees in zip(masks, allowed, strict=True):
            assert (of_degrees | ~mask).all()
            assert masks is not exact or torch.equal(of_degrees, mask)
        assert blocks == 0 or all(torch.equal(found[1], layer) for layer in found[1::2])
        ranks = [sorted(layer.tolist()) for layer in found]
        assert fan_in(ranks[1:], ranks[0])


@pytest.mark.parametrize("blocks", [0, 2])
def test_degrees_of_wide_layers_take_one_pass(blocks: int) -> None:
    """Masks as nflows, zuko and pyro make them, in an order of the features; D passes over these took seconds each."""
    dim, width = 300, 700
    features = torch.randperm(dim) + 1
    hidden = [torch.arange(width) % (dim - 1) + 1] * (1 + 2 * blocks if blocks else 2)
    masks = [after[:, None] >= before for before, after in zip([features, *hidden], hidden, strict=False)]
    start = time.process_time()
    found = degrees([*masks, features[:, None] > hidden[-1]], blocks)
    assert time.process_time() - start < 2
    assert all(map(torch.equal, found, [features, *hidden]))


def test_a_cycle_has_no_degrees() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(Unfusable, match="depends on itself"):
        degrees([one, one])
