"""Flows as torch.distributions: shapes, values, gradients, caches."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution

from glf_fast import CouplingFlow, Flow, FlowTransform, Inverse, SequentialFlow
from glf_fast.conversion.padded import Padded
from glf_fast.flow import Embedded

from .conftest import Case


def flow(context_dim: int = 0, dim: int = 3) -> CouplingFlow:
    torch.manual_seed(0)
    made = CouplingFlow(dim, 2, (8,), context_dim).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made.eval()


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Independent:
    return Independent(Normal(torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)), len(shape))


def counted(monkeypatch: pytest.MonkeyPatch, made: Flow) -> list[str]:
    calls: list[str] = []
    for name in ("forward", "inverse"):
        original = getattr(made, name)

        def call(*args: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(made, name, call)
    return calls


def test_every_flow_is_a_distribution(case: Case) -> None:
    x, *context = case.inputs(4)
    distribution = case.flow.distribution(*context, validate_args=True)
    assert distribution.event_shape == case.flow.event_shape
    assert distribution.batch_shape == ((4,) if context else ())
    torch.testing.assert_close(distribution.log_prob(x), case.flow.log_prob(x, *context))
    samples, log_prob = distribution.rsample_and_log_prob((3,))
    assert samples.shape == (3, *distribution.batch_shape, *case.flow.event_shape)
    assert distribution.sample().shape == distribution.batch_shape + case.flow.event_shape
    assert log_prob.shape == (3, *distribution.batch_shape)


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
@pytest.mark.parametrize("sample", [(), (5,), (1, 3)])
def test_shapes_with_context(batch: tuple[int, ...], sample: tuple[int, ...]) -> None:
    made, context = flow(2), torch.randn(*batch, 2, dtype=torch.float64)
    distribution = made.distribution(context)
    x, log_prob = distribution.rsample_and_log_prob(sample)
    assert x.shape == (*sample, *batch, 3) and log_prob.shape == (*sample, *batch)
    torch.testing.assert_close(distribution.log_prob(x), log_prob)
    rows = made.log_prob(x.reshape(-1, 3), context.expand(*sample, *batch, 2).reshape(-1, 2))
    torch.testing.assert_close(log_prob, rows.reshape(log_prob.shape))


def test_one_value_against_many_contexts() -> None:
    made, context = flow(2), torch.randn(4, 2, dtype=torch.float64)
    x = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(made.distribution(context).log_prob(x), made.log_prob(x.expand(4, 3), context))


def test_expand() -> None:
    made, context = flow(2), torch.randn(4, 2, dtype=torch.float64)
    expanded = made.distribution(context).expand((5, 4))
    assert expanded.batch_shape == (5, 4) and expanded.rsample((2,)).shape == (2, 5, 4, 3)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(expanded.log_prob(x), made.distribution(context).log_prob(x))
    without = flow().distribution().expand((5,))
    assert without.log_prob(torch.zeros(3, dtype=torch.float64)).shape == (5,)
    assert Independent(without, 1).event_shape == (5, 3)


def test_gradients_reach_parameters_and_context() -> None:
    made = flow(2)
    context = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    for draw in (lambda d: d.rsample((3,)), lambda d: d.log_prob(torch.zeros(3, dtype=torch.float64))):
        made.zero_grad()
        context.grad = None
        draw(made.distribution(context)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
        assert context.grad is not None and (context.grad.abs().sum(1) > 0).all()
    assert not made.distribution(context).sample().requires_grad


def test_log_prob_is_the_density_of_the_samples() -> None:
    """E[q/p] = 1 over the samples for a narrower normal q: p is their density, and integrates to one."""
    distribution = flow(dim=2).distribution()
    x, log_prob = distribution.rsample_and_log_prob((200_000,))
    mean, covariance = x.mean(0), x.T.cov()
    normal = torch.distributions.MultivariateNormal(mean, 0.2 * covariance)
    torch.testing.assert_close((normal.log_prob(x) - log_prob).exp().mean().item(), 1.0, rtol=0.02, atol=0)


def test_validation_is_torchs() -> None:
    checked = flow().distribution(validate_args=True)
    with pytest.raises(ValueError, match="support"):
        checked.log_prob(torch.full((3,), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="event"):
        checked.log_prob(torch.zeros(2, 4, dtype=torch.float64))
    assert flow().distribution(validate_args=False).log_prob(torch.full((3,), torch.nan, dtype=torch.float64)).isnan()


@pytest.mark.parametrize("make", [lambda f, c: f.distribution(c), FlowTransform])
def test_context_is_checked(make: Any) -> None:
    with pytest.raises(ValueError, match=r"needs a context of shape \(…, 2\); got None"):
        make(flow(2), None)
    with pytest.raises(ValueError, match=r"got \(4, 3\)"):
        make(flow(2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="context_dim=0"):
        make(flow(), torch.zeros(4, 3))


def test_copies_and_pickles() -> None:
    distribution = flow(2).distribution(torch.randn(4, 2, dtype=torch.float64))
    transform = FlowTransform(distribution.flow, distribution.context)
    x = transform(torch.randn(4, 3, dtype=torch.float64))  # a filled cache with a graph in it
    for how in (copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):
        torch.testing.assert_close(how(distribution).log_prob(x), distribution.log_prob(x))
        torch.testing.assert_close(how(transform).inv(x), transform.inv(x))


# -- the transform -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_size", [0, 1])
def test_transform_is_the_flow(case: Case, cache_size: int) -> None:
    case.flow.double()
    x, *context = (t.double() for t in case.inputs(4))
    transform = FlowTransform(case.flow, *context, cache_size=cache_size)
    assert transform.bijective and transform.domain.event_dim == transform.codomain.event_dim == len(x.shape[1:])
    z, logdet = case.flow(x, *context)
    torch.testing.assert_close(transform.inv(x), z)
    torch.testing.assert_close(transform(z), x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), -logdet)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(x, z), logdet)
    assert transform.inv.inv is transform
    data = TransformedDistribution(noise(case.flow.event_shape), [transform])
    torch.testing.assert_close(data.log_prob(x), case.flow.log_prob(x, *context))


def test_composes_with_other_transforms() -> None:
    """A density on (0, 1)³: what torch's own transforms do after the flow."""
    made = flow()
    data = TransformedDistribution(noise((3,)), [FlowTransform(made), torch.distributions.SigmoidTransform()])
    y = data.sample((6,))
    x = torch.logit(y)
    torch.testing.assert_close(data.log_prob(y), made.log_prob(x) - (y * (1 - y)).log().sum(1))
    assert data.expand((4,)).rsample().shape == (4, 3)


def test_log_prob_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made = flow()
    calls = counted(monkeypatch, made)
    data = TransformedDistribution(noise((3,)), [FlowTransform(made)])
    x = torch.randn(4, 3, dtype=torch.float64)
    data.log_prob(x)
    assert calls == ["forward"]
    calls.clear()
    data.log_prob(data.rsample((4,)))
    assert calls == ["inverse"]
    calls.clear()
    TransformedDistribution(noise((3,)), [FlowTransform(made).with_cache(0)]).log_prob(x)
    assert calls == ["forward", "inverse"]


def test_cache_never_serves_what_is_old() -> None:
    made = flow()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    data = TransformedDistribution(noise((3,)), [FlowTransform(made)])
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(3):  # the same tensor again and again, as full-batch training does
        optimizer.zero_grad()
        loss = -data.log_prob(x).mean()
        torch.testing.assert_close(loss, -made.log_prob(x).mean())
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        sample = data.sample((4,))
    assert data.log_prob(sample).requires_grad  # not the pair that was made without gradients
    old = data.rsample((4,))
    optimizer.step()
    torch.testing.assert_close(data.log_prob(old), made.log_prob(old))
    sample = data.sample((4,))
    with torch.no_grad():
        data.log_prob(sample)
        sample.add_(1)
        torch.testing.assert_close(data.log_prob(sample), made.log_prob(sample))


def test_with_cache() -> None:
    transform = FlowTransform(flow(), cache_size=0)
    assert transform.with_cache(0) is transform
    assert transform.with_cache().with_cache(0)._cache_size == 0
    with pytest.raises(ValueError, match="cache_size"):
        FlowTransform(flow(), cache_size=2)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizers_step_ends_the_pair(fused: bool) -> None:
    """Fused optimizers leave version counters as they are."""
    made = flow()
    transform = FlowTransform(made)
    z = torch.randn(4, 3, dtype=torch.float64)
    x = transform(z)
    data = TransformedDistribution(noise((3,)), [transform])
    data.log_prob(x.detach()).sum().backward()
    x = transform(z)
    torch.optim.Adam(made.parameters(), lr=0.1, fused=fused).step()
    torch.testing.assert_close(transform.inv(x), made(x)[0])
    assert not torch.allclose(transform.inv(x), z)


@pytest.mark.parametrize("change", ["parameter", "context", "data", "frozen"])
def test_whatever_changes_ends_the_pair(change: str) -> None:
    made, context = flow(2), torch.randn(2, dtype=torch.float64)
    transform = FlowTransform(made, context)
    made.requires_grad_(change != "frozen")
    x = transform(torch.randn(4, 3, dtype=torch.float64))
    if change == "frozen":
        made.requires_grad_(True)
    else:
        {"parameter": made.mlp_biases[0], "context": context, "data": x}[change].data.add_(0.5)
    z, logdet = transform.inv(x), transform.log_abs_det_jacobian(transform.inv(x), x)
    torch.testing.assert_close(z, made(x, context)[0])
    torch.testing.assert_close(logdet, -made(x, context)[1])
    assert z.requires_grad


def test_torch_func_goes_through_the_transform() -> None:
    made = flow()
    data = TransformedDistribution(noise((3,)), [FlowTransform(made)])
    x = torch.randn(4, 3, dtype=torch.float64)
    scores = torch.func.vmap(torch.func.grad(data.log_prob))(x)
    leaf = x.clone().requires_grad_()
    made.log_prob(leaf).sum().backward()
    torch.testing.assert_close(scores, leaf.grad)


def test_a_context_gives_the_transformed_distribution_its_batch_shape() -> None:
    """Every row has noise of its own, as with torch's own transforms of many parameters."""
    made, context = flow(2), torch.randn(5, 2, dtype=torch.float64)
    transform = FlowTransform(made, context)
    data = TransformedDistribution(noise((3,)), [transform, torch.distributions.SigmoidTransform()])
    assert (data.batch_shape, data.event_shape) == ((5,), (3,))
    x = data.rsample()
    z = transform.inv(torch.logit(x))
    assert x.shape == (5, 3) and len(z.unique(dim=0)) == 5
    assert data.rsample((7,)).shape == (7, 5, 3) and data.log_prob(x).shape == (5,)
    assert TransformedDistribution(noise((3,)).expand((2, 1)), [transform]).batch_shape == (2, 5)
    with pytest.raises(ValueError, match=r"end in the flow's event shape \(3,\); got \(5, 4\)"):
        transform.forward_shape((5, 4))


def test_repr_says_what_it_is() -> None:
    made, context = flow(2), torch.randn(5, 2, dtype=torch.float64)
    assert repr(made.distribution(context)) == "FlowDistribution(CouplingFlow, event_shape=(3,), batch_shape=(5,))"
    assert repr(FlowTransform(flow())) == "FlowTransform(CouplingFlow, event_shape=(3,))"


@pytest.mark.parametrize("context_shape", [(4,), (2, 3)])
def test_embedded_contexts(context_shape: tuple[int, ...]) -> None:
    """Everything takes the context as it is before the embedding, which runs once for each of them."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(context_shape), 2)).double()
    rows: list[int] = []
    network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    made = Embedded(flow(2), network, context_shape)
    context = torch.randn(5, *context_shape, dtype=torch.float64)
    for distribution in (
        made.distribution(context),
        made.distribution(context[0]).expand((5,)),
        TransformedDistribution(noise((3,)), [FlowTransform(made, context)]),
    ):
        rows.clear()
        x = distribution.rsample((7,))
        assert x.shape == (7, 5, 3) and rows == [5]
    data = made.distribution(context)
    torch.testing.assert_close(data.log_prob(x)[2], made.log_prob(x[2], context))
    torch.testing.assert_close(made.log_prob(x[2], context[0]), made.distribution(context[0]).log_prob(x[2]))
    assert made.sample(6, context[0]).shape == (6, 3)
    with pytest.raises(ValueError, match="context must have shape"):
        made.log_prob(x[2], torch.zeros(5, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="is conditional"):
        made.log_prob(x[2])


@pytest.mark.parametrize(
    "wrap",
    [
        Inverse,
        lambda made: Inverse(Inverse(made)),
        lambda made: SequentialFlow([made], made.event_shape, context_shape=made.context_shape),
        lambda made: Embedded(made, torch.nn.Identity(), made.context_shape),
        lambda made: Padded(made, 3, torch.arange(3)),
    ],
    ids=["Inverse", "Inverse of Inverse", "SequentialFlow", "Embedded", "Padded"],
)
def test_flows_around_a_flow_take_its_contexts(wrap: Callable[[Flow], Flow]) -> None:
    made = Embedded(flow(2), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(50, 2)).double(), (2, 5, 5))
    around = wrap(made)
    context = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    assert around.context_shape == (2, 5, 5)
    x = around.distribution(context).sample()
    torch.testing.assert_close(around.distribution(context).log_prob(x), around.log_prob(x, context))
