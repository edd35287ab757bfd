"""Wasserstein autoencoder whose codes are drawn to the prior by a discriminator of codes: WAE-GAN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from glf_fast.models.adversarial import accuracy, discrimination, frozen, prior
from glf_fast.models.dcgan_networks import CodeDiscriminator
from glf_fast.models.latent import ExPostModel, ExPostSettings
from glf_fast.models.model import Phase, Words
from glf_fast.models.reconstruction import reconstruction_loss
from glf_fast.settings import NOT_NEGATIVE, Rule

__all__ = ["WAEGAN", "WAEGANSettings"]


@dataclass(frozen=True)
class WAEGANSettings(ExPostSettings):
    """Wasserstein autoencoder with a discriminator of codes."""

    name: str = "wae-gan"
    """Name of the model."""
    reconstruction: Literal["mse", "bce", "l1", "perceptual"] = "mse"
    """Distance between images and their reconstructions."""
    code_weight: float = 200.0
    """Weight of the discriminator of codes in the loss of the encoder, against the reconstruction loss of an image."""
    code_hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Widths of the hidden layers of the discriminator of codes."""

    RULES: ClassVar[Mapping[str, Rule]] = {
        **ExPostSettings.RULES,
        "code_weight": NOT_NEGATIVE,
        "code_hidden": (lambda value: len(value) > 0 and min(value) > 0, "at least one positive width"),
    }

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions, {self.reconstruction} loss, λ = {self.code_weight:g}"


class WAEGAN(ExPostModel):
    """WAE-GAN (Tolstikhin, Bousquet, Gelly, Schölkopf, arXiv:1711.01558, algorithm 1), with a deterministic encoder E.

    A step has two phases, with decoder G, discriminator C of codes (D_γ in the paper) and z ~ N(0, I):

        C      −E log C(z) − E log(1 − C(E(x)))
        E, G   E d(G(E(x)), x) − λ·E log C(E(x))

    The default λ is that of the released code for MNIST: 10, with 0.05·‖G(E(x)) − x‖² for d. Its C has the four layers of 512
    units of the default here, with ReLUs.

    As in that code, log p(z) of the prior is added to the network's output, logit C(z) = h(z) + log p(z), of which the best h
    is −log q(z), the density of codes: gradients of the first term alone pull codes that are far away back to the prior. Its
    constant is left to the bias of h.

    Args:
        shape: (C, H, W) of the images, H and W multiples of 4.
        settings: see `WAEGANSettings`; `code_weight` is λ, `reconstruction` is d.
    """

    Settings = WAEGANSettings
    groups = ("autoencoder", "code_discriminator")
    words = Words(
        "WAE-GAN",
        curves={"reconstruction": "reconstruction", "code_accuracy": "accuracy of C"},
        about_curves="The accuracy of C is 0.5 where C cannot tell codes from N(0, I), and 1 where C has won.",
        advice=(
            "C has won where its accuracy is near 1: lower --code-discriminator-optimizer.lr, or raise --model.code-weight"
        ),
    )
    settings: WAEGANSettings

    def __init__(self, shape: Sequence[int], settings: WAEGANSettings = WAEGANSettings()) -> None:
        super().__init__(shape, settings)
        self.code_discriminator = CodeDiscriminator(settings.latent_dim, settings.code_hidden)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"autoencoder": encoder and decoder, "code_discriminator": C}."""
        return {**super().parameter_groups(), "code_discriminator": list(self.code_discriminator.parameters())}

    def phases(self) -> tuple[Phase, ...]:
        """C, then encoder and decoder."""
        return (
            Phase(self.discriminate, moves=("code_discriminator",), minimises="code_loss", gradients=True),
            Phase(self.losses, moves=("autoencoder",), gradients=True),
        )

    def discriminate(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss and the accuracy of C for a batch x (B, C, H, W) in [0, 1]; `generator` is the source of z."""
        with torch.no_grad():
            codes = self.encode(x)
        z = prior(codes, self.settings.latent_dim, generator)
        real, fake = (self.code_discriminator(c) + _log_prior(c) for c in (z, codes))
        return {"code_loss": discrimination(real, fake), "code_accuracy": accuracy(real, fake)}

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch x (B, C, H, W) in [0, 1]: the loss of encoder and decoder, and its two terms."""
        codes = self.encode(x)
        error = reconstruction_loss(self.settings.reconstruction, self.decode(codes), x)
        penalty = softplus(-frozen(self.code_discriminator, codes) - _log_prior(codes)).mean()
        return {"loss": error + self.settings.code_weight * penalty, "reconstruction": error, "code_penalty": penalty}


def _log_prior(z: Tensor) -> Tensor:
    """log p(z) of z (B, D) under N(0, I) without its mean over z ~ N(0, I): (D − ‖z‖²)/2, (B, 1)."""
    return 0.5 * (1 - z.square()).sum(1, keepdim=True)
