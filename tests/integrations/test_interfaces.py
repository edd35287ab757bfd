"""Flows of ours where nflows', zuko's and pyro's are expected."""

import pytest
import torch
from torch import nn

from glf_fast import CouplingFlow, FlowTransform
from glf_fast.integrations import nflows as ours_as_nflows
from glf_fast.integrations import zuko as ours_as_zuko


def flow(context_dim: int) -> CouplingFlow:
    torch.manual_seed(0)
    made = CouplingFlow(3, 2, (8,), context_dim)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made.eval()


@pytest.fixture(params=[0, 2])
def pair(request: pytest.FixtureRequest) -> tuple[CouplingFlow, torch.Tensor | None]:
    made = flow(request.param)
    return made, torch.randn(4, 2) if request.param else None


def test_nflows_shapes_are_nflows(pair: tuple[CouplingFlow, torch.Tensor | None]) -> None:
    made, context = pair
    ours = ours_as_nflows.Flow(made)
    from nflows import transforms
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow

    class Net(nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.layer = nn.Linear(n_in + made.context_dim, n_out)

        def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
            return self.layer(x if context is None else torch.cat([x, context], 1))

    theirs = Flow(transforms.AffineCouplingTransform(torch.tensor([0, 0, 1]), Net), StandardNormal([3]))
    x = torch.randn(4, 3)
    for name, arguments in {
        "log_prob": (x, context),
        "transform_to_noise": (x, context),
        "sample": (5, context),
        "sample_and_log_prob": (5, context),
    }.items():
        got, wanted = getattr(ours, name)(*arguments), getattr(theirs, name)(*arguments)
        got, wanted = (t if isinstance(t, tuple) else (t,) for t in (got, wanted))
        assert [t.shape for t in got] == [t.shape for t in wanted], name
    # nflows joins the parts of a conditional sample along the wrong dimension.
    assert ours.sample(5, context, batch_size=2).shape == theirs.sample(5, context).shape


def test_nflows_values(pair: tuple[CouplingFlow, torch.Tensor | None]) -> None:
    made, context = pair
    ours, x = ours_as_nflows.Flow(made), torch.randn(4, 3)
    torch.testing.assert_close(ours(x, context), made.log_prob(x, context))
    torch.testing.assert_close(ours.transform_to_noise(x, context), made(x, context)[0])
    samples, log_prob = ours.sample_and_log_prob(6, context)
    for m in range(4 if context is not None else 1):
        rows, values = (samples[m], log_prob[m]) if context is not None else (samples, log_prob)
        torch.testing.assert_close(values, made.log_prob(rows, None if context is None else context[m]))


def test_nflows_parts_and_a_context_that_is_not_used(pair: tuple[CouplingFlow, torch.Tensor | None]) -> None:
    """Code that composes a flow of its parts, and nflows' custom to give unconditional flows a context."""
    made, context = pair
    ours, x = ours_as_nflows.Flow(made), torch.randn(4, 3)
    z, logdet = ours._transform(x, context=ours._embedding_net(context))
    torch.testing.assert_close(ours._distribution.log_prob(z) + logdet, ours.log_prob(x, context))
    torch.testing.assert_close(ours._transform.inverse(z, context=context)[0], x, rtol=1e-4, atol=1e-4)
    assert ours._distribution.sample(5, torch.zeros(2, 1)).shape == (2, 5, 3)
    assert ours._distribution.sample(5).shape == (5, 3)
    with pytest.raises(NotImplementedError, match="average samples"):
        ours.mean(context)
    if context is None:
        unused = torch.randn(4, 7)
        torch.testing.assert_close(ours.log_prob(x, unused), ours.log_prob(x))
        torch.testing.assert_close(ours.transform_to_noise(x, unused), z)
        samples, log_prob = ours.sample_and_log_prob(6, unused)
        assert samples.shape == (4, 6, 3) and log_prob.shape == (4, 6)
        torch.testing.assert_close(log_prob[2], made.log_prob(samples[2]))


def test_nflows_batches_of_none_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be ≥ 1"):
        ours_as_nflows.Flow(flow(0)).sample(5, batch_size=0)


def test_zuko(pair: tuple[CouplingFlow, torch.Tensor | None]) -> None:
    made, c = pair
    import zuko

    ours, theirs = ours_as_zuko.Flow(made), zuko.flows.RealNVP(3, made.context_dim)
    x = torch.randn(4, 3)
    torch.testing.assert_close(ours(c).log_prob(x), made.log_prob(x, c))
    for draw in (
        lambda f: f(c).log_prob(x),
        lambda f: f(c).sample((5,)),
        lambda f: f(c).sample(),
        lambda f: f(c).rsample_and_log_prob((5,))[1],
    ):
        assert draw(ours).shape == draw(theirs).shape
    assert set(ours.state_dict()) == {f"flow.{name}" for name in made.state_dict()}


def test_zuko_latents(pair: tuple[CouplingFlow, torch.Tensor | None]) -> None:
    """`flow(c).transform(x)` and `flow(c).base`, which are how zuko's users get at them."""
    made, c = pair
    import zuko

    ours, theirs = ours_as_zuko.Flow(made)(c), zuko.flows.RealNVP(3, made.context_dim)(c)
    x = torch.randn(4, 3)
    z, logdet = made(x, c)
    torch.testing.assert_close(ours.transform(x), z)
    torch.testing.assert_close(ours.transform.log_abs_det_jacobian(x, z), logdet)
    torch.testing.assert_close(ours.transform.inv(z), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.base.log_prob(z) + logdet, ours.log_prob(x))
    flow = ours_as_zuko.Flow(made)
    torch.testing.assert_close(flow.transform(c)(x), z)
    assert flow.base(c).batch_shape == ours.base.batch_shape
    assert ours.expand((2, 4)).base.batch_shape == (2, 4)
    assert (ours.base.batch_shape, ours.base.event_shape) == (theirs.base.batch_shape, theirs.base.event_shape)
    assert ours.transform(x).shape == theirs.transform(x).shape


def test_pyro_guide_learns_a_posterior() -> None:
    """SVI with a flow as guide: pyro.sample, gradients through rsample, the ELBO grows."""
    import pyro
    import pyro.distributions as dist

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide_flow = CouplingFlow(2, 3, (16,), actnorm=False)
    data = torch.tensor([1.5, -0.5])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=data)

    def guide() -> None:
        pyro.module("flow", guide_flow)
        base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [FlowTransform(guide_flow)]))

    elbo = pyro.infer.Trace_ELBO(num_particles=64, vectorize_particles=True)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    before = guide_flow.mlp_weights[1].detach().clone()
    losses = [svi.step() for _ in range(150)]
    assert not torch.equal(guide_flow.mlp_weights[1], before)
    # Conjugate: the evidence is known, and the ELBO reaches it where the guide is exact.
    evidence = torch.distributions.Normal(0.0, (1 + 0.3**2) ** 0.5).log_prob(data).sum().item()
    assert losses[0] > 2 - evidence
    assert sum(losses[-20:]) / 20 == pytest.approx(-evidence, abs=0.05)
