"""sbi's NPE and NLE with our density estimators."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sbi.inference import NLE, NPE
from sbi.utils import BoxUniform, MultipleIndependent
from torch import nn
from torch.distributions import Dirichlet, Distribution, Gamma, Normal, Uniform

from glf_fast.integrations.sbi import FlowEstimator, coupling_flow, coupling_likelihood, maf, maf_likelihood, train
from glf_fast.integrations.unconstrained import Unconstrained

PRIOR = BoxUniform(-torch.ones(3), torch.ones(3))


def simulate(theta: torch.Tensor) -> torch.Tensor:
    """A linear Gaussian: x = (θ₁, θ₂ + θ₃) + 0.2·noise, in units of their own."""
    return 100 * torch.stack([theta[:, 0], theta[:, 1] + theta[:, 2]], 1) + 20 * torch.randn(len(theta), 2) + 7


def simulations(n: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    theta = PRIOR.sample((n,))
    return theta, simulate(theta)


def built(builder: Callable[..., Any] = coupling_flow, **options: Any) -> FlowEstimator:
    theta, x = simulations()
    made = builder(**{"steps": 3, "hidden": (16,), **options})(theta, x)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.eval()


KINDS = {"coupling": coupling_flow(steps=5, hidden=(32, 32)), "maf": maf(hidden=(32, 32))}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest) -> tuple[NPE, FlowEstimator]:
    theta, x = simulations(4000)
    trainer = NPE(PRIOR, density_estimator=KINDS[request.param], show_progress_bars=False).append_simulations(theta, x)
    settings = {"learning_rate": 2e-3, "stop_after_epochs": 8}
    return trainer, trainer.train(**settings) if request.param == "coupling" else train(trainer, **settings)


def test_posterior_is_the_true_one(trained: Any) -> None:
    """Against the posterior on a grid: each marginal's mean and deviation, and that of θ₂ + θ₃, which alone is measured."""
    posterior = trained[0].build_posterior()
    x = torch.tensor([[37.0, -23.0]])
    torch.manual_seed(1)
    samples = posterior.sample((20_000,), x=x, show_progress_bars=False)
    assert samples.shape == (20_000, 3) and PRIOR.log_prob(samples).isfinite().all()
    ticks = torch.linspace(-1, 1, 101)
    theta = torch.cartesian_prod(ticks, ticks, ticks)
    mean = torch.stack([theta[:, 0], theta[:, 1] + theta[:, 2]], 1)
    weights = torch.softmax(-0.5 * (((x - 7) / 100 - mean) / 0.2).square().sum(1), 0)
    for name, f in {"θ₁": lambda t: t[:, 0], "θ₂": lambda t: t[:, 1], "θ₂ + θ₃": lambda t: t[:, 1] + t[:, 2]}.items():
        mean, spread = (weights * f(theta)).sum(), f(samples).std()
        wanted = (weights * (f(theta) - mean).square()).sum().sqrt()
        assert abs(f(samples).mean() - mean) < 0.3 * wanted, name
        assert 0.8 < spread / wanted < 1.25, name


def test_posterior_does_all_that_it_should(trained: Any) -> None:
    trainer, _ = trained
    posterior = trainer.build_posterior()
    x = simulate(PRIOR.sample((4,)))
    batched = posterior.sample_batched((6,), x=x, show_progress_bars=False)
    assert batched.shape == (6, 4, 3)
    assert posterior.log_prob_batched(batched, x=x).shape == (6, 4)
    assert posterior.log_prob(batched[:, 0], x=x[:1]).isfinite().all()
    again = pickle.loads(pickle.dumps(posterior))
    torch.testing.assert_close(*(
        # Without the share of q outside the prior, which is estimated by sampling.
        p.log_prob(batched[:, 0], x=x[:1], norm_posterior=False) for p in (again, posterior)
    ))  # fmt: skip
    posterior.set_default_x(x[:1])
    assert posterior.map(num_iter=20, num_to_optimize=5, show_progress_bars=False).shape == (1, 3)


def test_training_moved_all_parameters(trained: Any, request: pytest.FixtureRequest) -> None:
    _, estimator = trained
    fresh = KINDS[request.node.callspec.params["trained"]](*simulations(4000))
    for name, p in estimator.named_parameters():
        assert not torch.equal(p, dict(fresh.named_parameters())[name]), name


def test_maf_is_of_the_kind_and_size_of_sbis() -> None:
    """As many parameters, masked ones included, and the same functions; it starts as the identity of standardised θ."""
    from sbi.neural_nets import posterior_nn

    theirs, ours = posterior_nn("maf")(*simulations()), maf()(*simulations())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    config = ours.net.layers[-1].config
    assert (config["steps"], config["hidden"], config["activation"]) == (5, (50, 50, 50), "tanh")
    assert config["log_scale"] == "softplus" and config["context_layer"] and not config["actnorm"]
    theta, x = simulations(500)
    z = ours.inverse_transform(theta, x)
    torch.testing.assert_close(z.flip(1).mean(0), torch.zeros(3), rtol=0, atol=0.1)
    torch.testing.assert_close(z.std(0), torch.ones(3), rtol=0.1, atol=0)


def test_second_round(recwarn: pytest.WarningsRecorder) -> None:
    """The atomic loss, which compares each θ with many: batches of (samples, batch) in training."""
    theta, x = simulations(300)
    trainer = NPE(PRIOR, density_estimator=coupling_flow(steps=2, hidden=(8,)), show_progress_bars=False)
    with pytest.warns(UserWarning, match="not yet fully converged"):
        trainer.append_simulations(theta, x).train(max_num_epochs=2)
    proposal = trainer.build_posterior().set_default_x(x[:1])
    theta = proposal.sample((300,), show_progress_bars=False)
    with pytest.warns(UserWarning, match="not yet fully converged"):
        trainer.append_simulations(theta, simulate(theta), proposal=proposal).train(max_num_epochs=2)
    assert math.isfinite(trainer.summary["best_validation_loss"][-1])


@pytest.mark.parametrize("builder", [coupling_flow, maf])
def test_shapes_are_sbis(builder: Callable[..., Any]) -> None:
    """Every combination that sbi's own estimator takes, and the same answer's shape."""
    from sbi.neural_nets import posterior_nn

    theirs, ours = posterior_nn("maf")(*simulations()), built(builder)
    for theta, x in (
        ((5, 4, 3), (4, 2)), ((4, 3), (4, 2)), ((5, 4, 3), (1, 2)), ((5, 1, 3), (4, 2)),
        ((5, 4, 3), (5, 4, 2)), ((1, 4, 3), (4, 2)),
    ):  # fmt: skip
        a, b = torch.randn(theta), torch.randn(x)
        assert ours.log_prob(a, b).shape == theirs.log_prob(a, b).shape, (theta, x)
    x = torch.randn(4, 2)
    assert ours.loss(torch.randn(4, 3), x).shape == (4,)
    for sample_shape in ((5,), (5, 2), ()):
        sample_shape = torch.Size(sample_shape)
        assert ours.sample(sample_shape, x).shape == (*sample_shape, 4, 3)
        assert ours.sample_and_log_prob(sample_shape, x)[1].shape == (*sample_shape, 4)


def test_values_agree_with_one_another() -> None:
    ours = built()
    theta, x = simulations(4)
    log_prob = ours.log_prob(theta[None], x)
    torch.testing.assert_close(ours.loss(theta, x), -log_prob[0])
    for i in range(4):  # each row alone
        torch.testing.assert_close(ours.log_prob(theta[i, None], x[i, None]), log_prob[:, i, None])
    samples, log_prob = ours.sample_and_log_prob(torch.Size((7,)), x)
    torch.testing.assert_close(ours.log_prob(samples, x), log_prob, rtol=1e-4, atol=1e-4)
    z = ours.inverse_transform(theta, x)
    assert z.shape == (4, 3) and ours.inverse_transform(theta, x[:1]).shape == (4, 3)
    context = ours.embedding_net(x)
    torch.testing.assert_close(ours.net.inverse(z, context)[0], theta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("z_score", ["independent", "structured", "none"])
def test_standardisation_is_part_of_the_density(z_score: str) -> None:
    """log q in the units of θ, whatever is done inside: the samples' density integrates to one."""
    ours = built(z_score_theta=z_score, z_score_x=z_score).double()
    x = simulations(1)[1].double()
    samples, log_prob = ours.sample_and_log_prob(torch.Size((50_000,)), x)
    samples, log_prob = samples[:, 0], log_prob[:, 0]
    narrow = torch.distributions.MultivariateNormal(samples.mean(0), 0.2 * samples.T.cov())
    assert (narrow.log_prob(samples) - log_prob).exp().mean().item() == pytest.approx(1, abs=0.05)


def test_units_do_not_matter() -> None:
    """Simulations in other units train to the same density: what makes standardisation worth its while."""
    losses = []
    for unit, origin in ((1.0, 0.0), (1e6, 0.0), (1e-6, 0.0), (1.0, 1e4)):
        theta, x = simulations(500)
        theta, x = theta * unit + origin, x * unit + origin
        torch.manual_seed(1)
        ours = coupling_flow(steps=2, hidden=(8,))(theta, x)
        optimizer = torch.optim.Adam(ours.parameters(), 5e-3)
        for _ in range(50):
            optimizer.zero_grad()
            loss = ours.loss(theta, x).mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item() - 3 * math.log(unit))
    assert losses[1:] == pytest.approx(3 * losses[:1], abs=0.02)


def test_standardisation_keeps_the_digits_of_a_large_mean() -> None:
    theta, x = simulations(300)
    theta = theta + 1e4
    standardise = coupling_flow(steps=2, hidden=(8,))(theta, x).net.layers[0]
    z, _ = standardise(theta)
    exact, _ = copy.deepcopy(standardise).double()(theta.double())
    torch.testing.assert_close(z.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(standardise.inverse(z)[0], theta)


def test_embedding_net() -> None:
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    theta, _ = simulations(300)
    x = torch.randn(300, 2, 8)
    net(x)
    before = copy.deepcopy(net.state_dict())
    trainer = NPE(
        PRIOR, density_estimator=coupling_flow(steps=2, hidden=(8,), embedding_net=net), show_progress_bars=False
    )
    with pytest.warns(UserWarning, match="not yet fully converged"):
        estimator = trainer.append_simulations(theta, x).train(max_num_epochs=3)
    assert estimator.embedding_net[1] is net  # as with sbi's own estimators
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    again = trainer._build_neural_net(theta, x).embedding_net[1]  # for retraining from scratch
    assert again is not net and all(torch.equal(p, before[name]) for name, p in again.named_parameters())
    assert trainer.build_posterior().sample((5,), x=x[:1], show_progress_bars=False).shape == (5, 3)


def test_refusals() -> None:
    theta, x = simulations(10)
    with pytest.raises(ValueError, match=r"two or more parameters.*use maf\(transform='spline'\) for one parameter"):
        coupling_flow()(theta[:, :1], x)
    with pytest.raises(ValueError, match=r"a density of vectors; x has shape \(10, 2, 1\)"):
        maf_likelihood()(theta, x[..., None])
    with pytest.raises(ValueError, match=r"context of shape \(10, 2, 1\).*embedding_net"):
        coupling_flow()(theta, x[..., None])
    with pytest.raises(ValueError, match="z_score_theta must be"):
        coupling_flow(z_score_theta="whitened")(theta, x)
    unconstrained = {"z_score_theta": "transform_to_unconstrained"}
    with pytest.raises(ValueError, match="needs the prior"):
        coupling_flow(**unconstrained)(theta, x)
    with pytest.raises(ValueError, match="of 10 simulated θ are outside the prior's support"):
        coupling_flow(**unconstrained, prior=BoxUniform(torch.zeros(3), torch.ones(3)))(theta, x)
    with pytest.raises(ValueError, match=r"must be an interval in each dimension; got Simplex\(\)"):
        coupling_flow(**unconstrained, prior=Dirichlet(torch.ones(3)))(theta, x)
    with pytest.raises(ValueError, match="Distribution, does not say what its support is"):
        coupling_flow(**unconstrained, prior=Distribution(validate_args=False))(theta, x)


def independent_priors() -> MultipleIndependent:
    one = torch.ones(1)
    return MultipleIndependent([Uniform(-3 * one, one), Gamma(2 * one, one), Normal(5 * one, 2 * one)])


def box() -> BoxUniform:
    return BoxUniform(torch.tensor([-1.0, 0, 5]), torch.tensor([1.0, 1e-3, 9]))


@pytest.mark.parametrize("make", [box, independent_priors])
def test_unconstrained_is_a_bijection_of_the_support(make: Callable[[], Distribution]) -> None:
    torch.manual_seed(0)
    prior = make()
    layer = Unconstrained.of(prior, 3).double()
    theta = prior.sample((50,)).double()
    z, logdet = layer(theta)
    back, logdet_back = layer.inverse(z)
    torch.testing.assert_close(back, theta)
    torch.testing.assert_close(logdet_back, -logdet)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda t: layer(t[None])[0][0]))(theta)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet)
    assert prior.support.check(layer.inverse(5 * torch.randn(1000, 3).double())[0]).all()
    theta[:, 0] = -3.5
    assert (layer(theta)[1] == -torch.inf).all()


def test_gradients_far_out_are_finite() -> None:
    layer = Unconstrained.of(independent_priors(), 3)
    for z in ([120.0, 80.0, 500.0], [-120.0, -80.0, -500.0]):
        noise = torch.tensor([z], requires_grad=True)
        theta, logdet = layer.inverse(noise)
        assert torch.autograd.grad(theta.sum() + logdet.sum(), noise)[0].isfinite().all()


def test_a_bound_itself_is_inside() -> None:
    layer = Unconstrained.of(PRIOR, 3)
    z, logdet = layer(torch.tensor([[-1.0, 1.0, 0.0]]))
    assert z.isfinite().all() and logdet.isfinite().all()


def test_unconstrained_posteriors_stay_inside_the_prior() -> None:
    theta, x = simulations(2000)
    estimator = coupling_flow(steps=4, hidden=(32,), z_score_theta="transform_to_unconstrained", prior=PRIOR)
    trainer = NPE(PRIOR, density_estimator=estimator, show_progress_bars=False)
    trained = trainer.append_simulations(theta, x).train(learning_rate=5e-3, stop_after_epochs=3)
    samples = trained.sample((2000,), x[:3])
    assert PRIOR.log_prob(samples).isfinite().all()
    posterior = trainer.build_posterior()
    drawn = posterior.sample((100,), x=x[:1], show_progress_bars=False)
    # Nothing is outside, so that sbi's correction for it is 0.
    torch.testing.assert_close(
        posterior.log_prob(drawn, x=x[:1]), posterior.log_prob(drawn, x=x[:1], norm_posterior=False)
    )
    assert (trained.log_prob(torch.full((1, 3), 1.5), x[:1]) == -torch.inf).all()


def shifted(theta: torch.Tensor) -> torch.Tensor:
    """x of as many columns as θ: 1000 + 100·(θ + 0.3·noise)."""
    return 1000 + 100 * (theta + 0.3 * torch.randn_like(theta))


def test_densities_of_one_number() -> None:
    """Splines take any shape, here two peaks that a normal distribution cannot have; affine transforms say what they are."""
    torch.manual_seed(0)
    theta, x = 2 * torch.rand(500, 1) - 1, torch.randn(500, 2)
    theta = theta.sign() * (0.5 + 0.1 * torch.randn_like(theta))
    splines = maf(steps=2, hidden=(8,), transform="spline", spline={"bins": 10, "low": -3.0, "high": 3.0})(theta, x)
    optimizer = torch.optim.Adam(splines.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        splines.loss(theta, x).mean().backward()
        optimizer.step()
    drawn = splines.sample(torch.Size((1000,)), x[:1]).abs()
    assert 0.05 < drawn.std() < 0.2 and abs(drawn.mean() - 0.5) < 0.05
    with pytest.warns(UserWarning, match=r"normal distributions alone: use maf\(transform='spline'\)"):
        maf(steps=1, hidden=(8,))(theta, x)


@pytest.mark.parametrize(
    "builder", [coupling_likelihood(steps=4, hidden=(32,)), maf_likelihood(hidden=(32,))], ids=["coupling", "maf"]
)
def test_likelihood_is_the_true_one(builder: Callable[..., Any]) -> None:
    """NLE, whose x given θ is known: a Gaussian with mean 1000 + 100·θ and deviation 30."""
    torch.manual_seed(0)
    prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    theta = prior.sample((2000,))
    trainer = NLE(prior, density_estimator=builder, show_progress_bars=False)
    estimator = trainer.append_simulations(theta, shifted(theta)).train(learning_rate=3e-3, stop_after_epochs=10)
    at = torch.tensor([[0.5, -0.5]])
    x = estimator.sample(torch.Size((5000,)), at)[:, 0]
    torch.testing.assert_close(x.mean(0), 1000 + 100 * at[0], rtol=0, atol=6)
    torch.testing.assert_close(x.std(0), torch.tensor([30.0, 30]), rtol=0.15, atol=0)
    posterior = trainer.build_posterior(sample_with="rejection")
    samples = posterior.sample((500,), x=1000 + 100 * at, show_progress_bars=False)
    torch.testing.assert_close(samples.mean(0), at[0], rtol=0, atol=0.08)
    torch.testing.assert_close(samples.std(0), torch.tensor([0.3, 0.3]), rtol=0.2, atol=0)


@pytest.mark.parametrize(("trainer", "builder"), [(NLE, coupling_flow), (NPE, coupling_likelihood), (NLE, maf)])
@pytest.mark.parametrize("common", [False, True])
def test_estimators_in_the_wrong_place_are_refused(trainer: type, builder: Callable[..., Any], common: bool) -> None:
    theta = PRIOR.sample((200,))
    x = shifted(theta)
    if common:
        x[:, 0] = theta[:, 0]
    wrong = trainer(PRIOR, density_estimator=builder(steps=2, hidden=(8,)), show_progress_bars=False)
    with pytest.raises(ValueError, match="θ and x have changed places: NPE takes coupling_flow"):
        wrong.append_simulations(theta, x).train(max_num_epochs=1)


def test_loss_broadcasts_one_condition_and_checks_shapes() -> None:
    theta, x = simulations(300)
    ours = coupling_flow(steps=2, hidden=(8,))(theta, x)
    torch.testing.assert_close(ours.loss(theta[:5], x[:1]), -ours.log_prob(theta[None, :5], x[:1].expand(5, -1))[0])
    with pytest.raises(ValueError, match="does not match the expected input"):
        ours.loss(theta[:5, :1], x[:5])
    with pytest.raises(ValueError, match="does not match the"):
        ours.loss(theta[:5], x[:5, :1])
