"""The two-stage VAE: what its second stage learns, and the likelihood of both stages."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from glf_fast import models
from glf_fast.models.two_stage_vae import SecondStage, TwoStageVAE


def build(**settings: object) -> TwoStageVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"shape": [1, 8, 8], "latent_dim": 1, "width": 4, "hidden": 16, "second_stage": {"hidden": [8, 8]}}
        model = models.build("two-stage-vae", {**small, **settings})
    assert isinstance(model, TwoStageVAE)
    return model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(stage: SecondStage, codes: Tensor, steps: int) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(stage.parameters(), lr=1e-2)
    for step in range(steps):
        losses = stage.losses(codes, seeded(step))
        optimizer.zero_grad()
        losses["second_loss"].backward()
        optimizer.step()
    return losses


def test_the_second_stage_finds_distribution_and_noise_of_codes() -> None:
    # A circle of radius 3 around (5, 0) in four dimensions, with noise of 0.5 in all of them.
    angle = 2 * math.pi * torch.rand(400, generator=seeded(1))
    codes = 0.5 * torch.randn(400, 4, generator=seeded(2))
    codes[:, 0] += 5 + 3 * angle.cos()
    codes[:, 1] += 3 * angle.sin()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stage = SecondStage(4, (32, 32))
    stage.mean.copy_(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    stage.std.fill_(2.0)  # the same for all, so that the noise stays isotropic
    losses = train(stage, codes, 400)
    assert losses["second_deviation"].item() == pytest.approx(0.25, rel=0.1)
    with torch.no_grad():
        u, noise = (torch.randn(2000, 4, generator=seeded(i)) for i in (3, 4))
        made = stage.sample(u, noise)
    # A normal distribution with the circle's covariance would have radii of 2.7 ± 1.4.
    radius = (made[:, :2] - torch.tensor([5.0, 0.0])).norm(dim=1)
    assert radius.mean().item() == pytest.approx(3.04, abs=0.2) and radius.std().item() < 0.9
    assert made[:, 2:].std().item() == pytest.approx(0.5, rel=0.1)


def test_the_variance_of_a_posterior_counts_in_the_standard_deviation() -> None:
    stage, h = SecondStage(2, (4,)), torch.randn(50, 4, generator=seeded())
    stage.standardise(h)
    torch.testing.assert_close(stage.mean, h[:, :2].mean(0))
    mean, log_variance = h.chunk(2, 1)
    draws = mean + (0.5 * log_variance).exp() * torch.randn(20_000, 50, 2, generator=seeded(1))
    torch.testing.assert_close(stage.std, draws.flatten(0, 1).std(0), rtol=1e-2, atol=0)


def test_stages_freeze_what_they_do_not_train(images: Tensor) -> None:
    model = build(latent_dim=3)
    first, between, second = model.stages()
    assert [phase.moves for phase in (*first.phases, *second.phases)] == [("autoencoder",), ("second_stage",)]
    assert between.fit is not None and between.inputs is not None and second.inputs is not None
    assert second.epochs == model.settings.second_stage.epochs
    with model.evaluating():
        h = second.inputs(images)
        between.fit(between.inputs(images))
    losses = second.phases[0].losses(h, seeded())
    assert all(torch.equal(losses[key], value) for key, value in model.second_losses(h, seeded()).items())
    assert not torch.equal(losses["second_loss"], model.second_losses(h, seeded(1))["second_loss"]), "codes are drawn"
    losses[second.phases[0].minimises].backward()
    groups = model.parameter_groups()
    assert all(p.grad is None for p in groups["autoencoder"]) and all(
        p.grad is not None for p in groups["second_stage"]
    )


def test_the_likelihood_is_the_integral_over_the_codes_of_both_stages() -> None:
    model = build(variance="fixed", deviation=0.5)
    model(torch.rand(16, 1, 8, 8, generator=seeded()), seeded())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
    model.double().eval()
    model.second_stage.mean.fill_(0.4)
    model.second_stage.std.fill_(1.5)
    torch.nn.init.zeros_(model.second_stage.learned.log_deviation)  # γ = 1
    x = torch.rand(2, 1, 8, 8, generator=seeded(3)).double()
    line = torch.linspace(-15, 15, 601).double()[:, None]
    with torch.no_grad():
        stage = model.second_stage
        given = Normal(stage.mean + stage.std * stage.decoder(line), stage.std * stage.learned().sqrt())
        log_prior = (given.log_prob(line.mT) + Normal(0.0, 1.0).log_prob(line)).logsumexp(0) + math.log(0.05)
        likelihoods = torch.stack([Independent(Normal(model.decoder(line), 0.5), 3).log_prob(one) for one in x])
    assert log_prior.logsumexp(0).item() + math.log(0.05) == pytest.approx(0, abs=1e-3), "p(z) is a density"
    integral = (likelihoods + log_prior).logsumexp(1) + math.log(0.05)
    estimates = model.log_likelihood(x.repeat(4000, 1, 1, 1), seeded()).unflatten(0, (4000, 2))
    torch.testing.assert_close(estimates.logsumexp(0) - math.log(4000), integral, rtol=0, atol=0.1)
    assert (estimates.mean(0) < integral).all(), "one sample gives a lower bound on average"


def test_samples_come_from_the_second_stage() -> None:
    model = build(latent_dim=3)
    codes = model.sample_codes(5, generator=seeded())
    source = seeded()
    u, noise = (torch.randn(5, 3, generator=source) for _ in range(2))
    torch.testing.assert_close(codes, model.second_stage.sample(u, noise))
    torch.testing.assert_close(model.sample_codes(5, generator=seeded(), mode="prior"), u)
