"""DCGAN: a generator and a discriminator made of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from glf_fast.models.adversarial import ADVICE, GAN, AdversarialSettings, accuracy, discrimination, frozen
from glf_fast.models.model import Phase, Words

__all__ = ["DCGAN", "DCGANSettings"]


@dataclass(frozen=True)
class DCGANSettings(AdversarialSettings):
    """DCGAN."""

    name: str = "dcgan"
    """Name of the model."""

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions"


class DCGAN(GAN):
    """DCGAN (Radford, Metz, Chintala, arXiv:1511.06434), with the non-saturating loss of Goodfellow et al., arXiv:1406.2661.

    A step has two phases, with generator G, discriminator D and z ~ N(0, I):

        D   −E log D(x) − E log(1 − D(G(z)))
        G   −E log D(G(z))

    The paper's z are uniform in [−1, 1]. Batch norm sees real and generated images as separate batches.

    Args:
        shape: (C, H, W) of the images, H and W multiples of 4.
        settings: see `DCGANSettings`.
    """

    Settings = DCGANSettings
    words = Words(
        "DCGAN",
        curves={
            "discriminator_loss": "loss of D",
            "generator_loss": "loss of G",
            "discriminator_accuracy": "accuracy of D",
        },
        about_curves="The accuracy of D is 0.5 where D cannot tell samples from images, and 1 where D has won.",
        advice=ADVICE,
    )
    settings: DCGANSettings

    def __init__(self, shape: Sequence[int], settings: DCGANSettings = DCGANSettings()) -> None:
        super().__init__(shape, settings)

    def phases(self) -> tuple[Phase, ...]:
        """D, then G."""
        return (
            Phase(self.discriminate, moves=("discriminator",), minimises="discriminator_loss", gradients=True),
            Phase(self.deceive, moves=("generator",), minimises="generator_loss", gradients=True),
        )

    def discriminate(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss and the accuracy of D for a batch x (B, C, H, W) in [0, 1]; `generator` is the source of z."""
        self._check_batch("x", x)
        with torch.no_grad():
            y = self.generated(x, generator)
        real, fake = self.discriminator(x), self.discriminator(y)
        return {"discriminator_loss": discrimination(real, fake), "discriminator_accuracy": accuracy(real, fake)}

    def deceive(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss of G, for as many samples as there are images x (B, C, H, W)."""
        fake = frozen(self.discriminator, self.generated(x, generator))
        return {"generator_loss": softplus(-fake).mean()}
