"""pyro's autoregressive transforms, converted and accelerated: orders, clamps, hybrids, distributions, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T
from pyro.distributions.torch_transform import ComposeTransformModule
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

from glf_fast import AutoregressiveFlow, Inverse, accelerate
from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.pyro import LIBRARY

pytestmark = pytest.mark.filterwarnings("ignore:ConditionalAutoRegressiveNN input_dim = 1:UserWarning")


def layer(dim: int, *hidden: int, activation: nn.Module | None = None, skip: bool = False, **options) -> nn.Module:
    """In a random order of the features, pyro's default."""
    network = AutoRegressiveNN(dim, list(hidden), nonlinearity=activation or nn.ELU(), skip_connections=skip)
    return T.AffineAutoregressive(network, **options)


def permuted(dim: int) -> nn.Module:
    parts = [layer(dim, 9), T.Permute(torch.randperm(dim)), layer(dim, 9), T.Permute(torch.randperm(dim))]
    return ComposeTransformModule(parts)


def clamped(dim: int) -> nn.Module:
    """Half of its log-scales are beyond the bounds, where pyro's gradient goes on."""
    flow = ComposeTransformModule([layer(dim, 12)])
    with torch.no_grad():
        flow[0].arn.layers[-1].bias[dim:] = torch.linspace(-9, 5, dim)
    return flow


def normalised(dim: int) -> nn.Module:
    """With a batch norm between, whose log-determinant is one number a column, whatever the batch."""
    norm = T.BatchNorm(dim)
    with torch.no_grad():
        for tensor in (norm.gamma, norm.moving_variance):
            tensor.uniform_(0.5, 2)
    return ComposeTransformModule([layer(dim, 16), norm.eval(), layer(dim, 16)]).eval()


def with_tensors(dim: int) -> nn.Module:
    """Kept transforms that are no modules, and whose tensors no module converts: one of them in a composition."""
    cholesky = T.LowerCholeskyAffine(torch.randn(dim), torch.rand(dim, dim).tril() + torch.eye(dim))
    affine = torch.distributions.AffineTransform(torch.randn(dim), 1 + torch.rand(dim))
    return ComposeTransformModule(
        [layer(dim, 9), cholesky, layer(dim, 9), torch.distributions.ComposeTransform([affine])]
    )


def prepared(flow: nn.Module) -> nn.Module:
    """pyro's inverses begin with zeros in float32, and tensors of no module stay in it."""
    if next(flow.parameters()).dtype == torch.float64:
        LIBRARY.prepare(flow)
    return flow


def distribution(flow: nn.Module, dim: int) -> dist.TransformedDistribution:
    return dist.TransformedDistribution(dist.Normal(torch.zeros(dim), 1.0).to_event(1), [flow])


CASES: dict[str, tuple[Callable[[int], nn.Module], int, str]] = {
    "iterated": (lambda d: T.iterated(3, T.affine_autoregressive, d, hidden_dims=[11, 9]), 6, "a3"),
    "one feature": (lambda d: ComposeTransformModule([layer(d, 5)]), 1, "a1"),
    "permuted": (permuted, 4, "a2"),
    "clamped": (clamped, 6, "a1"),
    "widths": (lambda d: ComposeTransformModule([layer(d, 5, 6, 7, 8), layer(d, 9)]), 4, "a1 a1"),
    "batch norm": (normalised, 4, "a1 KeptTransform a1"),
    "tensors of no module": (with_tensors, 4, "KeptTransform a1 KeptTransform a1"),
    "kept": (lambda d: ComposeTransformModule([layer(d, 7), layer(d, 9, stable=True)]), 4, "KeptTransform a1"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_case(tools, name: str) -> None:
    make, dim, outline = CASES[name]
    library = tools.Library(LIBRARY, lambda f, x, c: LIBRARY.log_prob(prepared(f), x, c), lambda f, z, c: f(z.clone()))
    flow = make(dim) if name == "clamped" else tools.shake(make(dim))
    converted = tools.prove(library, flow, dim, outline=outline)
    z = torch.randn(5, dim)
    torch.testing.assert_close(converted.inverse(z)[0], flow(z), rtol=1e-4, atol=1e-4)
    x = flow(z).detach()
    torch.testing.assert_close(converted.log_prob(x), distribution(flow, dim).log_prob(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dim", "rows"), [(1, 3), (16, 5), (16, 16)])
@pytest.mark.parametrize("training", [False, True])
def test_a_kept_batch_norm_counts_in_every_row(dim: int, rows: int, training: bool) -> None:
    flow = normalised(dim)
    flow[1].train(training)
    converted, x = convert(flow), torch.randn(rows, dim)
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    wanted = dist.TransformedDistribution(base, copy.deepcopy(list(flow.parts))).log_prob(x)
    torch.testing.assert_close(converted.log_prob(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_clamp_is_passed_by_the_gradient() -> None:
    flow = clamped(6).double()
    converted = convert(flow)
    assert isinstance(converted, Inverse)
    assert [m.config["log_scale"] for m in converted.modules() if isinstance(m, AutoregressiveFlow)] == ["clamp"]
    z = torch.randn(50, 6).double()
    log_scale = flow[0].arn(z)[1]
    assert ((log_scale < -5) | (log_scale > 3)).double().mean() > 0.3
    gradients = []
    for module, generate in ((flow, flow), (converted, lambda z: converted.inverse(z)[0])):
        generate(z).square().sum().backward()
        *_, last = (p.grad for p in module.parameters() if p.grad is not None)
        gradients.append(last.flatten().sort().values)  # of the outputs' biases
    torch.testing.assert_close(*gradients)


def elbo(p: dist.TransformedDistribution) -> Tensor:
    torch.manual_seed(1)
    z = p.rsample((64,))
    return (p.log_prob(z) + 0.5 * ((z - 1) / 0.5).square().sum(-1)).mean()


def test_a_guide_trains_as_before(tools) -> None:
    """By its own samples, whose log-density takes no other pass; and batches of any shape."""
    flow = tools.shake(permuted(4)).double()
    fast = copy.deepcopy(flow)
    report = accelerate(fast)
    assert [(r.couplings, r.reparametrised) for r in report.replaced] == [(2, "")] and not report.left
    losses = []
    for each in (flow, fast):
        p = dist.TransformedDistribution(dist.Normal(torch.zeros(4).double(), 1.0).to_event(1), [each])
        assert p.log_prob(p.rsample((3, 2))).shape == (3, 2)
        optimizer, found = torch.optim.Adam(each.parameters(), 1e-2), []
        for _ in range(10):
            loss = elbo(p)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-8)
    assert losses[0][-1] < losses[0][0]


def test_accelerated_after_use_and_copied() -> None:
    """pyro keeps the last values, with their graphs, and the inverse of a list of transforms with its parts."""
    flow, x = permuted(4), torch.randn(5, 4)
    p = distribution(flow, 4)
    wanted = p.log_prob(x)
    assert accelerate(flow)
    torch.testing.assert_close(p.log_prob(x), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow.inv(flow(x)), x)
    torch.testing.assert_close(distribution(copy.deepcopy(flow), 4).log_prob(x), wanted, rtol=1e-4, atol=1e-4)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    r"stable=True shifts by \(1 − σ\)·μ": lambda: ComposeTransformModule([layer(4, 9, stable=True)]),
    r"clipped to \(-5.0, 2.0\); \(-5, 3\) is covered": lambda: ComposeTransformModule(
        [layer(4, 9, log_scale_max_clip=2.0)]
    ),
    "skip connections": lambda: ComposeTransformModule([layer(4, 9, skip=True)]),
    "it has no AffineAutoregressive": lambda: ComposeTransformModule([T.spline(4)]),
    "convert takes a pyro.ComposeTransformModule": lambda: layer(4, 9),
}


@pytest.mark.parametrize("name", ["AutoRegressiveNN", "MaskedLinear"])
def test_networks_with_methods_of_their_own_stay(tools, name: str) -> None:
    with pytest.raises(ConversionError, match="Dropping has its own forward"):
        convert(tools.dropping(ComposeTransformModule([layer(4, 9)]), name).eval())


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        convert(REFUSED[reason]())
