"""nflows' flows, converted: couplings of every mask and kind, linear layers, normalizations, hybrids, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nflows import transforms as T
from nflows.distributions import ConditionalDiagonalNormal, StandardNormal
from nflows.distributions.normal import DiagonalNormal
from nflows.flows import Flow, SimpleRealNVP
from nflows.nn.nets import MLP as NflowsMLP
from nflows.nn.nets import ResidualNet
from nflows_couplings import Net
from nflows_couplings import alternating as every_other
from torch import Tensor, nn
from torch.nn import functional as F

from glf_fast import CouplingFlow
from glf_fast.conversion import ConversionError, convert, nflows
from glf_fast.conversion.accelerate import accelerate
from glf_fast.flow import Embedded

# nflows 0.14 calls what PyTorch deprecates: torch.triangular_solve in LU's inverse, torch.qr at the start of NaiveLinear.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.qr is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:the converted flow does not apply BatchNorm in training mode:UserWarning"),
]


@pytest.fixture
def library(tools):
    def inverse(flow, z, context):
        base = flow._distribution
        if isinstance(base, DiagonalNormal):
            z = base.mean_ + z * base.log_std_.exp()
        embedded = None if context is None else flow._embedding_net(context)
        return flow._transform.inverse(z, embedded)[0]

    return tools.Library(nflows.LIBRARY, lambda flow, x, context: flow.log_prob(x, context), inverse)


class Wrapped(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.net = NflowsMLP([n_in], [n_out], [9, 11], activation=F.elu)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


def coupling(dim: int, context: int, k: int, kind: type = T.AffineCouplingTransform, **options) -> nn.Module:
    mask = torch.where(torch.randperm(dim) < 1 + k % (dim - 1), 1, -1)
    hidden, activation = options.get("hidden", (8, 7)), options.get("activation", nn.SiLU())
    return kind(mask, lambda n_in, n_out: Net(n_in + context, n_out, hidden, activation))


def residual(dim: int, context: int, k: int, blocks: int = 2) -> nn.Module:
    """A coupling with nflows' default network, of another width and mask for each k."""
    options = {"context_features": context or None, "num_blocks": blocks, "activation": F.elu}
    mask = torch.where(torch.randperm(dim) < 1 + k % (dim - 1), 1, -1)
    return T.AffineCouplingTransform(mask, lambda n_in, n_out: ResidualNet(n_in, n_out, 7 + k, **options))


def alternating(dim: int, context: int, n: int = 4) -> list[nn.Module]:
    return list(every_other(dim, n, lambda n_in, n_out: Net(n_in + context, n_out, (16, 16), nn.ReLU())))


def flow(dim: int, *layers: nn.Module, base: type = StandardNormal) -> Flow:
    return Flow(T.CompositeTransform(layers), base([dim]))


def between(dim: int, context: int, *others: nn.Module) -> Flow:
    """The other layers with couplings before, between and after them."""
    layers: list[nn.Module] = [coupling(dim, context, 0)]
    for k, other in enumerate(others):
        layers += [other, coupling(dim, context, k + 1)]
    return flow(dim, *layers)


def actnorm(dim: int) -> nn.Module:
    layer = T.ActNorm(dim)
    layer(torch.randn(64, dim) * 2 + 1)
    return layer


def batch_norm(dim: int) -> nn.Module:
    layer = T.BatchNorm(dim)
    for _ in range(20):
        layer(torch.randn(64, dim) * 2 + 1)
    return layer.eval()


def standardized(dim: int, context: int) -> Flow:
    """As sbi builds them: fixed standardization first."""
    first = T.PointwiseAffineTransform(torch.randn(dim), torch.rand(dim) + 0.5)
    return flow(dim, first, T.CompositeTransform(alternating(dim, context)), base=DiagonalNormal)


CASES: dict[str, tuple[Callable[[int, int], nn.Module], str]] = {
    "alternating": (lambda d, c: flow(d, *alternating(d, c)), "4"),
    "random-masks": (lambda d, c: flow(d, *[coupling(d, c, k, hidden=(4 + k, 9 - k)) for k in range(5)]), "5"),
    "additive": (lambda d, c: flow(d, *[coupling(d, c, k, T.AdditiveCouplingTransform) for k in range(3)]), "3"),
    "permutations": (lambda d, c: between(d, c, T.RandomPermutation(d), T.ReversePermutation(d)), "3"),
    "LU": (lambda d, c: between(d, c, T.LULinear(d, identity_init=False), T.CompositeTransform([T.LULinear(d)])), "3"),
    "QR-SVD": (lambda d, c: between(d, c, T.QRLinear(d, 3), T.SVDLinear(d, 2)), "3"),
    "naive": (lambda d, c: between(d, c, T.NaiveLinear(d)), "2"),
    "householder": (lambda d, c: between(d, c, T.HouseholderSequence(d, 3).requires_grad_(False)), "2"),
    "actnorm": (lambda d, c: between(d, c, actnorm(d), T.LULinear(d)), "3"),
    "batch-norm": (lambda d, c: between(d, c, batch_norm(d)).eval(), "2"),
    "standardized": (standardized, "4"),
    "inverse": (
        lambda d, c: flow(
            d,
            T.InverseTransform(coupling(d, c, 0)),
            T.InverseTransform(T.CompositeTransform([T.LULinear(d), coupling(d, c, 1)])),
        ),
        "2",
    ),
    "residual": (
        lambda d, c: flow(
            d, *[residual(d, c, k) for k in range(3)], *alternating(d, c, 1), residual(d, c, 0, blocks=5)
        ),
        "3 1 1",
    ),
    "kept": (
        lambda d, c: between(d, c, T.MaskedAffineAutoregressiveTransform(d, 16, c or None, activation=F.celu)),
        "1 MaskedAffineAutoregressiveTransform 1",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dim", "context"), [(2, 0), (5, 2), (6, 1)])
def test_every_class(library, tools, name: str, dim: int, context: int) -> None:
    if name == "naive":  # its inverse calls torch.solve, which PyTorch has removed
        library.inverse = None
    make, outline = CASES[name]
    tools.prove(library, tools.shake(make(dim, context)), dim, context, outline)


def test_float32_is_at_least_as_close_to_the_truth(library, tools) -> None:
    tools.as_close(library, [tools.shake(make(5, 2)) for make, _ in CASES.values()], (5,), (2,))


def test_its_own_mlp_without_context(library, tools) -> None:
    mask = torch.tensor([1, -1, 1, -1])
    tools.prove(
        library, tools.shake(flow(4, *[T.AffineCouplingTransform(sign * mask, Wrapped) for sign in (1, -1)])), 4
    )


def test_alternating_couplings_are_one_launch() -> None:
    converted = convert(flow(6, *alternating(6, 2, 8)))
    (stacked,) = [m for m in converted.modules() if isinstance(m, CouplingFlow)]
    assert stacked.config["steps"] == 8 and stacked.config["log_scale"] == "nflows" and not stacked.held


def test_lu_between_couplings_is_plu_and_trains_what_lu_trains() -> None:
    layers = [layer for k in range(3) for layer in (T.LULinear(6), alternating(6, 0, 2)[k % 2])]
    converted = convert(flow(6, *layers))
    stacked = converted.layers[0]
    assert stacked.config["linear"] == "plu" and stacked.config["actnorm"]
    assert not stacked.actnorm_log_scale.requires_grad, "the bias of LU is trained, a scale besides it is not"
    assert stacked.actnorm_bias.requires_grad and stacked.linear_lower.requires_grad


def test_embedding_net_is_trained_with_the_flow(library, tools) -> None:
    embedding = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 3))
    embedded = Flow(T.CompositeTransform(alternating(4, 3)), StandardNormal([4]), embedding)
    converted = tools.prove(library, tools.shake(embedded), 4, 7)
    assert isinstance(converted, Embedded)
    assert sum(p.numel() for p in converted.embedding.parameters()) == sum(p.numel() for p in embedding.parameters())
    assert converted.sample(5, torch.randn(5, 7)).shape == (5, 4)


class Standardize(nn.Module):
    """As sbi puts it before its embedding nets: no parameters, so no shape."""

    def forward(self, context: Tensor) -> Tensor:
        return (context - 1) / 2


def test_an_embedding_net_without_parameters(library, tools) -> None:
    embedding = nn.Sequential(Standardize(), nn.Identity())
    tools.prove(
        library, tools.shake(Flow(T.CompositeTransform(alternating(4, 3)), StandardNormal([4]), embedding)), 4, 3
    )


def test_a_trained_checkpoint_of_the_library(library, tools) -> None:
    make = lambda: flow(3, T.ActNorm(3), *alternating(3, 2, 2), T.LULinear(3), *alternating(3, 2, 2))  # noqa: E731
    x, context = torch.randn(512, 3).cumsum(1), torch.randn(512, 2)
    tools.prove(library, tools.trained(library, make, x, context), 3, 2, "4")


def test_caches_of_the_original_do_not_matter() -> None:
    lu = T.LULinear(4, using_cache=True)
    cached = flow(4, *alternating(4, 0), lu).eval()
    with torch.no_grad():
        x = torch.randn(3, 4)
        cached.log_prob(x)
        lu.bias.add_(1.0)
        torch.testing.assert_close(convert(cached).log_prob(x), cached.log_prob(x))


def test_batch_norm_is_kept_in_training_mode(library) -> None:
    training = between(4, 0, batch_norm(4)).train()
    converted = convert(training)
    assert [layer for layer in converted.layers if isinstance(layer, T.BatchNorm)]
    x = torch.randn(64, 4)
    torch.testing.assert_close(converted.log_prob(x), training.log_prob(x), rtol=1e-4, atol=1e-4)


def test_another_scale_function_is_refused_or_read() -> None:
    """A subclass, and a release whose scale is something else, are not taken for what they are called."""

    class Softplus(T.AffineCouplingTransform):
        def _scale_and_shift(self, params):
            _, shift = super()._scale_and_shift(params)
            return F.celu(params[:, self.num_transform_features :]) + 1e-3, shift

    mask, net = torch.tensor([1, -1, 1, -1]), lambda a, b: Net(a, b, (8,), nn.ReLU())
    with pytest.raises(ConversionError, match=r"Softplus.: no kernel covers"):
        convert(flow(4, Softplus(mask, net)))
    Softplus.__module__ = "nflows.transforms.coupling"
    Softplus.__name__ = "AffineCouplingTransform"
    with pytest.raises(ConversionError, match="its scale is not"):
        convert(flow(4, Softplus(mask, net)))


def tied() -> Flow:
    first, second = alternating(4, 0, 2)
    second.transform_net = first.transform_net
    return flow(4, first, second)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SimpleRealNVP(4, 8, 2, 1, batch_norm_within_layers=True),
            r"_transforms.0 \(AffineCouplingTransform\): ResidualNet with batch norm is not covered",
        ),
        (tied, "shares parameters with another layer"),
        (lambda: flow(4, T.ActNorm(4), *alternating(4, 0)), "ActNorm has not seen data yet: run one training batch"),
        (
            lambda: Flow(alternating(4, 4)[0], ConditionalDiagonalNormal([4], nn.Linear(4, 8))),
            "base distribution ConditionalDiagonalNormal",
        ),
        (
            lambda: Flow(T.OneByOneConvolution(3), StandardNormal([3, 4, 4])),
            "no coupling or autoregressive layer that",
        ),
        (lambda: Flow(T.ReversePermutation(3), StandardNormal([3, 4])), r"on samples of shape \(3, 4\)"),
        (
            lambda: Flow(alternating(4, 2)[0], StandardNormal([4]), nn.Conv1d(1, 1, 3)),
            "its embedding_net does not start with a linear layer",
        ),
    ],
)
def test_refusals_name_layer_and_reason(make, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(make())


def test_other_residual_conditioners_stay_in_a_hybrid(library, tools) -> None:
    mask = torch.tensor([1, -1, 1, -1, 1])
    residual = T.AffineCouplingTransform(mask, lambda a, b: ResidualNet(a, b, 8, num_blocks=1, activation=F.celu))
    made = tools.shake(flow(5, *alternating(5, 0), residual, *alternating(5, 0)))
    tools.prove(library, made, 5, outline="4 AffineCouplingTransform 4")


def test_its_own_flow_with_residual_networks(library, tools) -> None:
    for additive in (False, True):
        made = SimpleRealNVP(4, 8, 3, 2, use_volume_preserving=additive)
        tools.prove(library, tools.shake(made), 4, outline="3")


@pytest.mark.parametrize("seed", range(8))
def test_random_compositions(seed: int) -> None:
    """Any transforms in any order, nested and inverted: the check in `convert` is the judge, once more in float32."""
    torch.manual_seed(seed)
    draw = lambda n: int(torch.randint(n, ()))  # noqa: E731
    dim, context = 2 + draw(6), draw(3)
    hidden = [(3 + draw(6), 3 + draw(6)) for _ in range(2)]
    kinds: list[Callable[[], nn.Module]] = [
        lambda: coupling(dim, context, draw(9), hidden=hidden[draw(2)], activation=nn.Tanh()),
        lambda: coupling(dim, context, draw(9), hidden=hidden[0]),
        lambda: coupling(dim, context, draw(9), T.AdditiveCouplingTransform),
        lambda: coupling(dim, context, draw(9)).requires_grad_(False),
        lambda: T.LULinear(dim, identity_init=False),
        lambda: T.QRLinear(dim, 2).requires_grad_(bool(draw(2))),
        lambda: T.RandomPermutation(dim),
        lambda: T.PointwiseAffineTransform(torch.randn(dim), torch.rand(dim) + 0.5),
        lambda: actnorm(dim),
        lambda: T.InverseTransform(T.CompositeTransform([T.LULinear(dim), coupling(dim, context, draw(9))])),
        lambda: T.CompositeTransform([actnorm(dim), T.ReversePermutation(dim)]),
        lambda: T.HouseholderSequence(dim, 2),
        lambda: T.MaskedAffineAutoregressiveTransform(dim, 6, context or None, use_residual_blocks=False),
        lambda: T.InverseTransform(T.MaskedAffineAutoregressiveTransform(dim, 6, context or None)),
    ]
    made = flow(dim, coupling(dim, context, 0), *[kinds[draw(len(kinds))]() for _ in range(8)])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    converted = convert(made)
    x, c = torch.randn(16, dim), torch.randn(16, context) if context else None
    torch.testing.assert_close(converted.log_prob(x, c), made.log_prob(x, c), rtol=1e-3, atol=1e-3)


def test_caches_that_hold_graphs_do_not_hinder() -> None:
    layers = [
        T.LULinear(4, using_cache=True),
        T.AffineCouplingTransform(torch.tensor([1, 0, 1, 0]), lambda i, o: Net(i, o, (8,), nn.Tanh())),
    ]
    original = Flow(T.CompositeTransform(layers), StandardNormal([4])).eval()
    x = torch.randn(5, 4)
    wanted = original.log_prob(x)  # the cache keeps the inverse, and how it was made
    torch.testing.assert_close(convert(original).log_prob(x), wanted)
    assert accelerate(original)
    torch.testing.assert_close(original.log_prob(x), wanted)
