"""Adversarial models: the losses of all phases, the gradient penalty, and what a discriminator of codes does to codes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glf_fast.models import build
from glf_fast.models.adversarial import critic_losses, frozen, gradient_penalty
from glf_fast.models.dcgan_networks import CodeDiscriminator, DCGANDecoder, DCGANEncoder, InfoGANDiscriminator

Hand = Callable[[Any, Tensor], dict[str, Tensor]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(name: str, **settings: Any) -> Any:
    """A model of 8 × 8 grey images in float64 and eval mode, in which no image depends on others, with spread-out logits."""
    wide = {"networks": "infogan", "hidden": 16} if name != "wae-gan" else {"hidden": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name, {"shape": [1, 8, 8], "latent_dim": 4, "width": 4, **wide, **settings}).double().eval()
        for part in ("discriminator", "code_discriminator"):
            if hasattr(model, part):
                getattr(model, part).head.weight.data.mul_(30)
    return model


# -- hand computation -----------------------------------------------------------------------------------------------------


def probability(network: nn.Module, x: Tensor) -> Tensor:
    return 1 / (1 + (-network(x)).exp())


def log_ratio(network: nn.Module, x: Tensor) -> Tensor:
    """E log D/(1 − D)."""
    p = probability(network, x)
    return (p.log() - (1 - p).log()).mean()


def bayes(network: nn.Module, real: Tensor, *fakes: Tensor) -> Tensor:
    """−E log D(x) − Σ E log(1 − D(y))."""
    return -probability(network, real).log().mean() - sum((1 - probability(network, y)).log().mean() for y in fakes)


def correct(network: nn.Module, real: Tensor, *fakes: Tensor) -> Tensor:
    of_fakes = torch.cat([probability(network, y) < 0.5 for y in fakes])
    return ((probability(network, real) > 0.5).double().mean() + of_fakes.double().mean()) / 2


def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    """The mean absolute error of pixels in [−1, 1]."""
    return ((2 * x_hat - 1) - (2 * x - 1)).abs().mean()


def noise(source: torch.Generator, n: int = 32) -> Tensor:
    return torch.randn(n, 4, generator=source, dtype=torch.float64)


def slopes(critic: nn.Module, x: Tensor, y: Tensor, source: torch.Generator) -> Tensor:
    """E (‖∇f‖ − 1)², a point at a time."""
    epsilon = torch.rand(len(x), 1, 1, 1, generator=source, dtype=torch.float64)
    norms = []
    for point in epsilon * x + (1 - epsilon) * y:
        point = point[None].detach().requires_grad_()
        norms.append(torch.autograd.grad(critic(point).squeeze(), point)[0].norm())
    return ((torch.stack(norms) - 1) ** 2).mean()


def alpha_gan(m: Any, x: Tensor) -> dict[str, Tensor]:
    """Algorithm 1, with λ = 7."""
    z, x_hat = m.encoder(x), m.decoder(m.encoder(x))
    drawn = noise(seeded())
    samples = m.decoder(drawn)
    return {
        "encoder_loss": 7 * l1(x_hat, x) - log_ratio(m.code_discriminator, z),
        "reconstruction": (x_hat - x).abs().sum() / 32,
        "implicit_posterior": log_ratio(m.code_discriminator, z),
        "generator_loss": 7 * l1(x_hat, x) - log_ratio(m.discriminator, x_hat) - log_ratio(m.discriminator, samples),
        "synthetic_likelihood": log_ratio(m.discriminator, x_hat),
        "synthetic_likelihood_of_samples": log_ratio(m.discriminator, samples),
        "discriminator_loss": bayes(m.discriminator, x, x_hat, samples),
        "discriminator_accuracy": correct(m.discriminator, x, x_hat, samples),
        "code_loss": bayes(m.code_discriminator, drawn, z),
        "code_accuracy": correct(m.code_discriminator, drawn, z),
    }


def alpha_gan_variants(m: Any, x: Tensor) -> dict[str, Tensor]:
    """A normal posterior with β = 3 and a critic with a penalty of 5."""
    mean, log_variance = m.encoder(x).chunk(2, 1)
    source = seeded()
    x_hat = m.decoder(mean + (log_variance / 2).exp() * noise(source))
    samples = m.decoder(noise(source))
    divergence = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1).mean()
    distances = [m.discriminator(x).mean() - m.discriminator(y).mean() for y in (x_hat, samples)]
    penalties = [slopes(m.discriminator, x, y, source) for y in (x_hat, samples)]
    return {
        "encoder_loss": 7 * l1(x_hat, x) + 3 * divergence,
        "divergence": divergence,
        "generator_loss": 7 * l1(x_hat, x) - m.discriminator(x_hat).mean() - m.discriminator(samples).mean(),
        "discriminator_loss": 5 * sum(penalties) - sum(distances),
        "distance": sum(distances) / 2,
        "penalty": sum(penalties) / 2,
    }


def dcgan(m: Any, x: Tensor) -> dict[str, Tensor]:
    samples = m.decoder(noise(seeded()))
    return {
        "discriminator_loss": bayes(m.discriminator, x, samples),
        "discriminator_accuracy": correct(m.discriminator, x, samples),
        "generator_loss": -probability(m.discriminator, samples).log().mean(),
    }


def wgan_gp(m: Any, x: Tensor) -> dict[str, Tensor]:
    source = seeded()
    samples = m.decoder(noise(source))
    distance = m.discriminator(x).mean() - m.discriminator(samples).mean()
    return {
        "discriminator_loss": 10 * slopes(m.discriminator, x, samples, source) - distance,
        "distance": distance,
        "generator_loss": -m.discriminator(samples).mean(),
    }


def wae_gan(m: Any, x: Tensor) -> dict[str, Tensor]:
    class Discriminator(nn.Module):  # of the density of codes alone: log p(z) is in the logit, but for its mean
        def forward(self, z: Tensor) -> Tensor:
            normal = torch.distributions.Normal(z.new_zeros(()), z.new_ones(()))
            return m.code_discriminator(z) + (normal.log_prob(z) + normal.entropy()).sum(1, keepdim=True)

    z, discriminator = m.encoder(x), Discriminator()
    error, drawn = (m.decoder(z) - x).square().sum() / 32, noise(seeded())
    penalty = -probability(discriminator, z).log().mean()
    return {
        "code_loss": bayes(discriminator, drawn, z),
        "code_accuracy": correct(discriminator, drawn, z),
        "loss": error + 7 * penalty,
        "reconstruction": error,
        "code_penalty": penalty,
    }


# Model, settings, losses by hand, and which networks the phases move, in order.
ALL = "encoder generator generator discriminator code_discriminator"
CASES: dict[str, tuple[str, dict[str, Any], Hand, str]] = {
    "alpha-gan": ("alpha-gan", {"reconstruction_weight": 7.0, "code_hidden": [8, 8]}, alpha_gan, ALL),
    "variants": (
        "alpha-gan",
        {
            "reconstruction_weight": 7.0,
            "posterior": "gaussian",
            "divergence_weight": 3.0,
            "objective": "wasserstein",
            "penalty": 5.0,
            "generator_steps": 1,
        },
        alpha_gan_variants,
        "encoder generator discriminator",
    ),
    "dcgan": ("dcgan", {}, dcgan, "discriminator generator"),
    "wgan-gp": ("wgan-gp", {}, wgan_gp, "discriminator generator"),
    "wae-gan": ("wae-gan", {"code_weight": 7.0, "code_hidden": [8]}, wae_gan, "code_discriminator autoencoder"),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_of_all_phases_are_the_formulas(case: str, images: Tensor) -> None:
    name, settings, by_hand, order = CASES[case]
    model, x = small(name, **settings), images.double()
    phases, expected, seen = model.phases(), by_hand(model, x), set()
    assert [group for phase in phases for group in phase.moves] == order.split()
    for i, phase in enumerate(phases):
        found = model(x, seeded(), 0, i)
        for loss, value in found.items():
            if loss in expected:
                torch.testing.assert_close(value, expected[loss], rtol=1e-9, atol=1e-12, msg=loss)
        seen |= found.keys()
        # A phase's loss has gradients for the networks that it moves, and for no others.
        model.zero_grad()
        found[phase.minimises].backward()
        moved = {p for group in phase.moves for p in model.parameter_groups()[group]}
        assert {p for p in model.parameters() if p.grad is not None and p.grad.any()} <= moved
        assert sum(bool(p.grad is not None and p.grad.any()) for p in moved) > 0.8 * len(moved)
    assert expected.keys() <= seen


def test_phases_take_turns_as_the_settings_say() -> None:
    assert [phase.every for phase in small("wgan-gp", critic_steps=3).phases()] == [1, 3]
    moves = [phase.moves for phase in small("alpha-gan", generator_steps=3).phases()]
    assert moves.count(("generator",)) == 3
    assert not small("alpha-gan", posterior="gaussian").parameter_groups()["code_discriminator"]


def test_the_penalty_of_a_linear_critic_is_known() -> None:
    """∇f is the weight everywhere, whatever ε: (‖w‖ − 1)², whose gradient is 2·(‖w‖ − 1)·w/‖w‖; at w = 0 nothing is NaN."""
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    x, y = torch.rand(2, 5, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    penalty = gradient_penalty(critic, x, y, seeded(1))
    [gradient] = torch.autograd.grad(penalty, critic[1].weight)
    w = critic[1].weight.detach()
    torch.testing.assert_close(penalty.detach(), (w.norm() - 1) ** 2)
    torch.testing.assert_close(gradient, 2 * (w.norm() - 1) * w / w.norm())
    found = critic_losses(critic, x, [y, y.flip(0)], 10.0, seeded(1))
    torch.testing.assert_close(found["distance"], ((x - y).mean(0).flatten() @ w[0]))
    nn.init.zeros_(critic[1].weight)
    assert torch.autograd.grad(gradient_penalty(critic, x, y, seeded()), critic[1].weight)[0].isfinite().all()


def test_a_frozen_network_passes_gradients_on_and_keeps_its_own_state() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    x = torch.randn(4, 3, generator=seeded(), requires_grad=True)
    frozen(network, x).square().sum().backward()
    assert x.grad is not None and x.grad.any() and all(p.grad is None and p.requires_grad for p in network.parameters())
    assert network[1].num_batches_tracked == 1, "batch norms see what they see without freezing"


@pytest.mark.parametrize(
    ("side", "blocks", "smallest"), [(8, 1, 4), (28, 2, 7), (32, 3, 4), (64, 4, 4), (20, 2, 5), (4, 1, 2)]
)
def test_networks_halve_images_down_to_four_pixels_or_more(side: int, blocks: int, smallest: int) -> None:
    x = torch.rand(2, 3, side, side, generator=seeded())
    encoder, decoder = DCGANEncoder(x.shape[1:], 5, 2), DCGANDecoder(x.shape[1:], 5, 2)
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [2 * 2**i for i in range(blocks)]
    assert encoder.head.in_features == smallest**2 * 2**blocks
    assert encoder(x).shape == (2, 5) and decoder(encoder(x)).shape == x.shape
    assert InfoGANDiscriminator(x.shape[1:], 2, 8, "layer")(x).shape == (2, 1)


def test_norms_are_where_they_belong() -> None:
    """None in the discriminator of codes, none that joins images in a critic: there an image's logit is its own."""
    assert not any("Norm" in type(m).__name__ for m in CodeDiscriminator(4).modules())
    x = torch.rand(4, 1, 28, 28, generator=seeded())
    for network in (DCGANEncoder((1, 28, 28), 1, 4, "layer"), InfoGANDiscriminator((1, 28, 28), 4, 8, "layer")):
        torch.testing.assert_close(network(x)[:2], network(x[:2]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("alpha-gan", {"reconstruction_weight": 0.0, "networks": "infogan"}), ("wae-gan", {"code_weight": 1e4})],
)
def test_the_discriminator_of_codes_draws_codes_to_the_prior(
    name: str, settings: dict[str, Any], images: Tensor
) -> None:
    """From N(2, …), over 200 steps; networks circle around N(0, I), so the codes of the second half are taken together."""
    fixed = {"shape": [1, 8, 8], "latent_dim": 2, "width": 4, "hidden": 16, "code_hidden": [32, 32]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = build(name, {**fixed, **settings})
    with torch.no_grad():
        model.encoder.head.bias.fill_(2.0)
    groups, codes = model.parameter_groups(), []
    optimizers = {group: torch.optim.Adam(groups[group], lr=3e-3, betas=(0.5, 0.9)) for group in groups}
    of_codes = {"encoder", "autoencoder", "code_discriminator"}
    phases = [(i, phase) for i, phase in enumerate(model.phases()) if of_codes.issuperset(phase.moves)]
    for step in range(200):
        for i, phase in phases:
            model.zero_grad()
            model(images, seeded(step), 0, i)[phase.minimises].backward()
            optimizers[phase.moves[0]].step()
        codes.append(model.encode(images).detach())
    late = torch.cat(codes[100:])
    assert codes[0].mean() > 1.5
    assert late.mean(0).abs().max() < 0.15 and (late.std(0) - 1).abs().max() < 0.15
