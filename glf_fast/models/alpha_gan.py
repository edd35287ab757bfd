"""Alpha-GAN: an autoencoder that is a GAN, whose likelihood and posterior are learned by discriminators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glf_fast.models.adversarial import (
    ADVICE,
    AdversarialSettings,
    accuracy,
    critic_losses,
    discrimination,
    discriminator,
    frozen,
    prior,
)
from glf_fast.models.dcgan_networks import CodeDiscriminator
from glf_fast.models.latent import LatentModel
from glf_fast.models.model import Phase, Words
from glf_fast.models.reconstruction import reconstruction_loss
from glf_fast.models.variational import draw, normal_divergence
from glf_fast.settings import NOT_NEGATIVE, POSITIVE, Rule

__all__ = ["AlphaGAN", "AlphaGANSettings"]


@dataclass(frozen=True)
class AlphaGANSettings(AdversarialSettings):
    """Alpha-GAN."""

    name: str = "alpha-gan"
    """Name of the model."""
    reconstruction_weight: float = 10.0
    """Weight λ of the mean absolute error of pixels, which are scaled to [-1, 1] for it."""
    generator_steps: int = 2
    """Updates of the generator in a step."""
    posterior: Literal["implicit", "gaussian"] = "implicit"
    """How codes are drawn to N(0, I). implicit: by a discriminator of codes (the paper); gaussian: by the divergence of a
    normal distribution, which is known in closed form."""
    code_hidden: tuple[int, ...] = (750, 750, 750)
    """For posterior implicit: widths of the hidden layers of the discriminator of codes."""
    divergence_weight: float = 0.001
    """For posterior gaussian: weight of the divergence of a code, in nats, beside λ."""
    objective: Literal["ratio", "wasserstein"] = "ratio"
    """Objective of the discriminator of images. ratio: the ratio of densities (the paper); wasserstein: that of WGAN-GP."""
    penalty: float = 10.0
    """For objective wasserstein: weight of the gradient penalty."""

    RULES: ClassVar[Mapping[str, Rule]] = {
        **AdversarialSettings.RULES,
        "reconstruction_weight": NOT_NEGATIVE,
        "generator_steps": POSITIVE,
        "code_hidden": (lambda value: len(value) > 0 and min(value) > 0, "at least one positive width"),
        "divergence_weight": NOT_NEGATIVE,
        "penalty": NOT_NEGATIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with this posterior and this objective, by name."""
        without = {"divergence_weight" if self.posterior == "implicit" else "code_hidden"}
        without |= {"penalty"} if self.objective == "ratio" else set()
        return {name: value for name, value in super().effective().items() if name not in without}

    def choice(self, name: str) -> str:
        """The field that decides whether the field `name` has an effect."""
        decides = {"divergence_weight": "posterior", "code_hidden": "posterior", "penalty": "objective"}
        return decides.get(name) or super().choice(name)

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions, λ = {self.reconstruction_weight:g}"


class AlphaGAN(LatentModel):
    """α-GAN (Rosca, Lakshminarayanan, Warde-Farley, Mohamed, arXiv:1706.04987).

    The lower bound of variational inference, E_q [log p_θ(x|z)] − KL(q_η(z|x) ‖ p(z)), with both terms learned by
    discriminators. A discriminator D_φ of images, or C_ω of codes, that is right with the probabilities of Bayes' rule gives
    the ratio of two densities, D/(1 − D) = p*/p_θ (the density ratio trick). So, with encoder E_η and generator G_θ,

        the likelihood:   explicit, p_θ(x|z) ∝ exp(−λ·‖x − G_θ(z)‖₁), and
                          the synthetic likelihood,  log p_θ(x|z) − log p*(x) = −log r_φ(G_θ(z)),  r_φ = D_φ/(1 − D_φ)
        the posterior:    the implicit posterior,    −KL(q_η ‖ p) = E_q log r_ω(z),                r_ω = C_ω/(1 − C_ω)

    which the hybrid objective adds, with the synthetic term in its non-saturating (reverse-KL) form, for samples as well:

        L(θ, η) = E_q [−λ·‖x − G_θ(z)‖₁ + log r_φ(G_θ(z)) + log r_ω(z)] + E_p(z) log r_φ(G_θ(z))

    A step is algorithm 1: four losses, each minimised for its own network, with ẑ = E_η(x), x̂ = G_θ(ẑ) and z ~ N(0, I).

        η   λ·‖x − x̂‖₁ + [−log C_ω(ẑ) + log(1 − C_ω(ẑ))]
        θ   λ·‖x − x̂‖₁ + [−log D_φ(x̂) + log(1 − D_φ(x̂))] + [−log D_φ(G_θ(z)) + log(1 − D_φ(G_θ(z)))]
        φ   −log D_φ(x) − log(1 − D_φ(x̂)) − log(1 − D_φ(G_θ(z)))
        ω   −log C_ω(z) − log(1 − C_ω(ẑ))

    Each bracket is −log r, which is minus the logit of the discriminator. In the paper's first version, algorithm 1 has z and ẑ
    exchanged in the loss of ω (equations 16 and 17); the authors have confirmed the error (victor-shepardson/alpha-GAN), as
    they have that the four networks are updated separately.

    As in the re-implementations (victor-shepardson, yjchoe), E is deterministic and ‖·‖₁ is a mean over the numbers of an
    image, here scaled to [−1, 1]; these codes have −log D for the brackets. The error that is logged is the sum over an image
    in [0, 1], as that of all models. Images, reconstructions and samples are separate batches for D's batch norm, and one batch
    for G's.

    Two variants are not in the paper:

        posterior gaussian       E gives μ and σ, ẑ = μ + σ·ε, and β·KL(N(μ, σ²) ‖ N(0, I)) takes the place of C_ω
        objective wasserstein    D is a critic with layer norm and the loss of `adversarial.critic_losses`, the sum of one for
                                 x̂ and one for G(z); −D takes the place of the brackets in the loss of θ

    Args:
        shape: (C, H, W) of the images, H and W multiples of 4.
        settings: see `AlphaGANSettings`; `reconstruction_weight` is λ, `divergence_weight` is β.
    """

    Settings = AlphaGANSettings
    groups = ("encoder", "generator", "discriminator", "code_discriminator")
    words = Words(
        "alpha-GAN",
        curves={
            "reconstruction": "absolute error per image",
            "discriminator_accuracy": "accuracy of D",
            "code_accuracy": "accuracy of C",
            "distance": "estimate of the Wasserstein distance",
            "divergence": "KL between posterior and prior",
        },
        about_curves=(
            "An accuracy is 0.5 where the discriminator of images (D) or of codes (C) cannot tell real from fake, and 1 "
            "where it has won."
        ),
        advice=f"{ADVICE}, then try --model.objective wasserstein or --model.posterior gaussian",
    )
    settings: AlphaGANSettings

    def __init__(self, shape: Sequence[int], settings: AlphaGANSettings = AlphaGANSettings()) -> None:
        self.implicit, self.wasserstein = settings.posterior == "implicit", settings.objective == "wasserstein"
        super().__init__(shape, settings, numbers=1 if self.implicit else 2)
        self.discriminator = discriminator(shape, settings, "layer" if self.wasserstein else "batch")
        if self.implicit:
            self.code_discriminator = CodeDiscriminator(settings.latent_dim, settings.code_hidden)
        absent = {"divergence" if self.implicit else "code_accuracy"}
        absent |= {"discriminator_accuracy" if self.wasserstein else "distance"}
        curves = {name: title for name, title in (self.words.curves or {}).items() if name not in absent}
        self.words = replace(self.words, curves=curves)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"encoder": E, "generator": G, "discriminator": D, "code_discriminator": C, which may be empty}."""
        return {
            "encoder": list(self.encoder.parameters()),
            "generator": list(self.decoder.parameters()),
            "discriminator": list(self.discriminator.parameters()),
            "code_discriminator": list(self.code_discriminator.parameters()) if self.implicit else [],
        }

    # -- training ------------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        """Encoder, generator, discriminator of images, discriminator of codes."""
        generator = Phase(self.generate, moves=("generator",), minimises="generator_loss", gradients=True)
        code = Phase(self.discriminate_codes, moves=("code_discriminator",), minimises="code_loss", gradients=True)
        return (
            Phase(self.infer, moves=("encoder",), minimises="encoder_loss", gradients=True),
            *(generator,) * self.settings.generator_steps,
            Phase(self.discriminate, moves=("discriminator",), minimises="discriminator_loss", gradients=True),
            *(code,) * self.implicit,
        )

    def infer(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The encoder's loss for a batch x (B, C, H, W) in [0, 1], and its terms: the error, and log r_ω or the divergence."""
        codes, h = self._posterior(x, generator)
        error = self._error(frozen(self.decoder, codes), x)
        loss = self._weighted(error)
        if self.implicit:
            posterior = frozen(self.code_discriminator, codes).mean()
            return {"encoder_loss": loss - posterior, "reconstruction": error, "implicit_posterior": posterior}
        divergence = normal_divergence(h).mean()
        loss = loss + self.settings.divergence_weight * divergence
        return {"encoder_loss": loss, "reconstruction": error, "divergence": divergence}

    def generate(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The generator's loss for a batch x, and log r_φ (or D), of reconstructions and of samples."""
        x_hat, samples = self._images(x, generator)
        likelihood, of_samples = (frozen(self.discriminator, y).mean() for y in (x_hat, samples))
        return {
            "generator_loss": self._weighted(self._error(x_hat, x)) - likelihood - of_samples,
            "synthetic_likelihood": likelihood,
            "synthetic_likelihood_of_samples": of_samples,
        }

    def discriminate(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss of the discriminator of images for a batch x, and its accuracy or the critic's terms."""
        with torch.no_grad():
            fakes = self._images(x, generator)
        if self.wasserstein:
            return critic_losses(self.discriminator, x, fakes, self.settings.penalty, generator)
        real, *logits = (self.discriminator(y) for y in (x, *fakes))
        return {
            "discriminator_loss": discrimination(real, *logits),
            "discriminator_accuracy": accuracy(real, *logits),
        }

    def discriminate_codes(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss and the accuracy of the discriminator of codes for a batch x."""
        with torch.no_grad():
            codes = self.encode(x)
        z = prior(codes, self.settings.latent_dim, generator)
        real, fake = self.code_discriminator(z), self.code_discriminator(codes)
        return {"code_loss": discrimination(real, fake), "code_accuracy": accuracy(real, fake)}

    def _posterior(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Codes ẑ (B, latent_dim) of images x, and what the encoder gives: these codes, or μ and log σ²."""
        self._check_batch("x", x)
        h = self.encoder(x)
        return (h if self.implicit else draw(h, generator)[0]), h

    def _images(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Reconstructions x̂ of x, and as many samples G(z), without gradients for the encoder."""
        with torch.no_grad():
            codes, _ = self._posterior(x, generator)
        z = prior(codes, self.settings.latent_dim, generator)
        x_hat, samples = self.decoder(torch.cat([codes, z])).chunk(2)
        return x_hat, samples

    def _error(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """The absolute error of an image in [0, 1], summed over its numbers, as a mean over the batch."""
        return reconstruction_loss("l1", x_hat, x)

    def _weighted(self, error: Tensor) -> Tensor:
        """λ·‖x − x̂‖₁ for such an error, as a mean over numbers in [−1, 1]."""
        return self.settings.reconstruction_weight * 2 * error / torch.Size(self.shape).numel()

    # -- use -----------------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Codes E(x) (B, latent_dim) of images x (B, C, H, W) in [0, 1]; with posterior gaussian, their means μ."""
        h = super().encode(x)
        return h if self.implicit else h.chunk(2, 1)[0]
