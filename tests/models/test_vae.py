"""The variational autoencoders against closed forms, numerical integrals and torch's distributions."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from glf_fast import models
from glf_fast.errors import UserError
from glf_fast.models.flow_vae import FlowVAE
from glf_fast.models.vae import VAE
from glf_fast.models.variational import VariationalModel

SMALL = {"shape": [1, 8, 8], "latent_dim": 2, "width": 4, "hidden": 16}
FLOW = {"steps": 2, "hidden": [8]}


def build(name: str = "vae", **settings: object) -> VariationalModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.build(name, {**SMALL, **settings})
    assert isinstance(model, VariationalModel)
    return model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(model: VariationalModel, x: Tensor, steps: int, lr: float = 1e-2) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        losses = model(x, seeded(step))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    return losses


def rough(model: VariationalModel) -> VariationalModel:
    """The model in float64 and eval mode, with random weights of its flows and far from its start."""
    model(torch.rand(16, 1, 8, 8, generator=seeded()), seeded())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
    return model.double().eval()


class LinearDecoder(nn.Module):
    """D(z) = W·z + b as an image of 8 × 8 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(64, dim, generator=seeded(1)))
        self.bias = nn.Parameter(torch.full((64,), 0.5))

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.weight.mT + self.bias).unflatten(1, (1, 8, 8))


class LinearEncoder(nn.Module):
    """N(A·(x − b), v) with the same variance v for every image."""

    def __init__(self, matrix: Tensor, bias: Tensor, log_variance: float) -> None:
        super().__init__()
        self.matrix, self.bias, self.log_variance = nn.Parameter(matrix), bias, log_variance

    def forward(self, x: Tensor) -> Tensor:
        mean = (x.flatten(1) - self.bias) @ self.matrix.mT
        return torch.cat([mean, torch.full_like(mean, self.log_variance)], 1)


def toy(samples: int, *, spread: float = 1.0) -> tuple[VariationalModel, MultivariateNormal]:
    """Probabilistic principal components with one latent dimension, whose exact posterior is (times `spread`) the encoder's."""
    s = 0.7
    model = build("vae", latent_dim=1, variance="fixed", deviation=s, importance_samples=samples)
    decoder = LinearDecoder(1)
    w, b = decoder.weight.detach(), decoder.bias.detach()
    precision = 1 + (w.mT @ w).item() / s**2
    model.decoder = decoder  # type: ignore[assignment]
    model.encoder = LinearEncoder(w.mT / s**2 / precision, b, math.log(spread**2 / precision))  # type: ignore[assignment]
    exact = MultivariateNormal(b.double(), (w @ w.mT + s**2 * torch.eye(64)).double())
    return model.double(), exact


def test_with_the_exact_posterior_every_sample_gives_the_exact_likelihood() -> None:
    for samples in (1, 3):
        model, exact = toy(samples)
        x = exact.sample((20,)).unflatten(1, (1, 8, 8))
        torch.testing.assert_close(model.log_likelihood(x, seeded()), exact.log_prob(x.flatten(1)), rtol=0, atol=1e-4)


def test_more_importance_samples_tighten_the_bound() -> None:
    _, exact = toy(1)
    torch.manual_seed(0)
    x = exact.sample((1000,)).unflatten(1, (1, 8, 8))
    truth = exact.log_prob(x.flatten(1)).mean().item()
    # A posterior of twice the width: the gap is KL(q ‖ p(z|x)) = (4 − 1)/2 − log 2.
    means = [toy(k, spread=2.0)[0].log_likelihood(x, seeded()).mean().item() for k in (1, 4, 16, 100)]
    assert means[0] == pytest.approx(truth - 1.5 + math.log(2), abs=0.1)
    assert means == sorted(means) and means[-1] == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("prior", ["normal", "flow"])
@pytest.mark.parametrize("posterior", ["normal", "flow"])
def test_the_likelihood_is_the_integral_over_the_codes(prior: str, posterior: str) -> None:
    options = {"variance": "fixed", "deviation": 0.5, "importance_samples": 4}
    if prior == posterior == "normal":
        model = rough(build("vae", **options))
    else:
        model = rough(build("flow-vae", prior=prior, posterior=posterior, flow=FLOW, **options))
    x = torch.rand(2, 1, 8, 8, generator=seeded(3)).double()
    line = torch.linspace(-9, 9, 91).double()
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        images, log_prior = model.decoder(grid), model._log_prior(grid, None)
        cell = 2 * math.log(18 / 90)
        assert log_prior.logsumexp(0) + cell == pytest.approx(0, abs=1e-2), "the prior is a density"
        likelihoods = [Independent(Normal(images, 0.5), 3).log_prob(one) for one in x]
    integral = torch.stack([(log + log_prior).logsumexp(0) + cell for log in likelihoods])
    estimates = model.log_likelihood(x.repeat(2000, 1, 1, 1), seeded()).unflatten(0, (2000, 2))  # of 4 samples each
    torch.testing.assert_close(estimates.logsumexp(0) - math.log(2000), integral, rtol=0, atol=0.1)


def test_the_elbo_has_the_divergence_of_the_loss(images: Tensor) -> None:
    model = build(latent_dim=4)
    losses = train(model, images, 20)
    torch.testing.assert_close(model.variance, losses["reconstruction"].detach() / 64, rtol=0.5, atol=0.0)
    with torch.no_grad():
        mean, log_variance = model.eval().encoder(images).chunk(2, 1)
        posterior, prior = Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)
        z = mean + posterior.stddev * torch.randn(mean.shape, generator=seeded())
        likelihood = Normal(model.decoder(z), model.variance.sqrt()).log_prob(images).flatten(1).sum(1)
        one_sample = likelihood + (prior.log_prob(z) - posterior.log_prob(z)).sum(1)
        torch.testing.assert_close(model.log_likelihood(images, seeded()), one_sample, rtol=1e-5, atol=1e-3)
        divergence = kl_divergence(posterior, prior).sum(1)
        torch.testing.assert_close(model(images, seeded())["divergence"], divergence.mean())
        draws = torch.stack([posterior.sample() for _ in range(4000)])
        estimates = (posterior.log_prob(draws) - prior.log_prob(draws)).sum(2).mean(0)
        torch.testing.assert_close(estimates, divergence, rtol=0, atol=0.2)


def test_a_flow_posterior_has_the_density_of_its_samples() -> None:
    model = rough(build("flow-vae", prior="normal", posterior="flow", flow=FLOW))
    assert isinstance(model, FlowVAE) and model.posterior is not None
    h = torch.randn(3, 4, generator=seeded(2)).double()
    z, log_q = model._posterior(h, seeded())
    for i in range(3):
        mean, log_variance = h[i].chunk(2)
        noise = torch.randn(3, 2, generator=seeded(), dtype=torch.float64)[i]
        code = lambda e, m=mean, v=log_variance, c=h[i]: model.posterior((m + (0.5 * v).exp() * e)[None], c[None])[0][0]  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(code, noise)
        expected = Normal(0.0, 1.0).log_prob(noise).sum() - torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(code(noise), z[i])
        torch.testing.assert_close(log_q[i], expected)


def test_the_loss_of_a_flow_vae_is_one_sample_of_the_bound(images: Tensor) -> None:
    model = build("flow-vae", flow=FLOW, variance="fixed", deviation=0.1, beta=0.5)
    assert isinstance(model, FlowVAE) and model.prior is not None
    model(images, seeded())
    model.eval()
    losses = model(images, seeded())
    mean, log_variance = model.encoder(images).chunk(2, 1)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    z = mean + posterior.stddev * torch.randn(mean.shape, generator=seeded())
    divergence = posterior.log_prob(z).sum(1) - model.prior.log_prob(z)
    likelihood = Normal(model.decoder(z), 0.1).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(losses["loss"], (0.5 * divergence - likelihood).mean())
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # No gradient is stopped: the encoder also feels the flow.
    [gradient] = torch.autograd.grad(model.prior.log_prob(model.encode(images)).sum(), [model.encoder.head.weight])
    assert gradient.abs().max() > 0


def test_a_fixed_deviation_is_the_weight_of_the_glf_paper(images: Tensor) -> None:
    losses = build(variance="fixed", deviation=800**-0.5).eval()(images, seeded())
    weighted = 400 * losses["reconstruction"] + losses["divergence"]
    constant = 32 * math.log(2 * math.pi / 800)
    torch.testing.assert_close(losses["loss"], weighted + constant)


@pytest.mark.parametrize("variance", ["batch", "learned"])
def test_the_variance_of_known_noise_is_found(variance: str) -> None:
    noise = 0.1 * torch.randn(128, 1, 8, 8, generator=seeded())
    model = build(variance=variance, beta=5.0)
    losses = train(model, 0.5 + noise, 80, lr=2e-2)
    assert losses["deviation"].item() == pytest.approx(0.1, rel=0.05)
    assert model._variance().sqrt().item() == pytest.approx(0.1, rel=0.05)


def test_a_density_of_the_codes_replaces_the_prior_in_samples(images: Tensor) -> None:
    for name, extra in (("vae", {}), ("flow-vae", {"flow": FLOW})):
        model = build(name, density={"kind": "mixture", "components": 2}, **extra)
        assert isinstance(model, VAE) and model.density is not None
        train(model, images, 20)
        first, second = model.stages()
        assert first.phases and second.inputs and second.fit
        with model.evaluating():
            codes = second.inputs(images)
        second.fit(codes)
        drawn = model.sample_codes(4000, generator=seeded())
        torch.testing.assert_close(drawn.mean(0), codes.mean(0), rtol=0, atol=0.15)
        prior = model.sample_codes(5, generator=seeded(), mode="prior")
        assert torch.equal(prior, model.sample_prior(5, generator=seeded())) and not torch.equal(prior, drawn[:5])


def test_a_flow_prior_is_where_samples_come_from() -> None:
    model = rough(build("flow-vae", flow=FLOW))
    assert isinstance(model, FlowVAE) and model.prior is not None
    assert torch.equal(model.sample_codes(5, generator=seeded()), model.prior.sample(5, generator=seeded()))
    middle = model.interpolate_codes(torch.tensor([[-1.0, 0.5]]).double(), torch.ones(1, 2).double(), 3)[:, 1]
    u = model.prior(torch.tensor([[-1.0, 0.5], [1.0, 1.0], middle[0].tolist()]).double())[0]
    torch.testing.assert_close(u[2] / u[2].norm(), (u[0] + u[1]) / (u[0] + u[1]).norm())


def test_words_say_which_bound_it_is() -> None:
    assert build().words.likelihood == "lower bound (ELBO), one sample of the posterior"
    assert "IWAE), 50 samples" in build(importance_samples=50).words.likelihood


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vae", {"deviation": 0.2}, 'deviation = 0.2 has no effect with variance = "batch"'),
        ("vae", {"variance": "fixed", "deviation": 0.0}, "deviation = 0.0 must be positive"),
        ("vae", {"importance_samples": 0}, "importance_samples = 0 must be positive"),
        ("flow-vae", {"prior": "normal"}, 'both "normal", so there is no flow'),
        ("flow-vae", {"posterior": "flow", "flow": {"kind": "rnvp"}}, 'flow.kind = "rnvp" has none'),
        ("flow-vae", {"latent_dim": 1}, "latent_dim = 1 must be 2 or more"),
    ],
)
def test_wrong_settings_are_named(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        models.build(name, {**SMALL, **settings})
    assert replace(models.kind(name).Settings()).summary()
