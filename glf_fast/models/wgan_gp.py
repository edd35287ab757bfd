"""WGAN-GP: a generator, and a critic whose gradients are kept at length 1, which estimates the Wasserstein distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from glf_fast.models.adversarial import GAN, AdversarialSettings, critic_losses, frozen
from glf_fast.models.model import Phase, Words
from glf_fast.settings import NOT_NEGATIVE, POSITIVE, Rule

__all__ = ["WGANGP", "WGANGPSettings"]


@dataclass(frozen=True)
class WGANGPSettings(AdversarialSettings):
    """WGAN with a gradient penalty."""

    name: str = "wgan-gp"
    """Name of the model."""
    critic_steps: int = 5
    """Updates of the critic for each update of the generator; each has a batch of its own."""
    penalty: float = 10.0
    """Weight of the gradient penalty."""

    RULES: ClassVar[Mapping[str, Rule]] = {
        **AdversarialSettings.RULES,
        "critic_steps": POSITIVE,
        "penalty": NOT_NEGATIVE,
    }

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions, λ = {self.penalty:g}"


class WGANGP(GAN):
    """WGAN-GP (Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville, arXiv:1704.00028, algorithm 1).

    With generator G, critic D and z ~ N(0, I):

        D   E D(G(z)) − E D(x) + λ·E (‖∇D(x̃)‖₂ − 1)²,        x̃ = ε·x + (1 − ε)·G(z),  ε ~ U(0, 1)
        G   −E D(G(z)), in every `critic_steps`-th step

    The critic has layer norm instead of batch norm, as the paper recommends, so that its gradient at an image does not depend
    on others.

    Args:
        shape: (C, H, W) of the images, H and W multiples of 4.
        settings: see `WGANGPSettings`; `penalty` is λ, `critic_steps` is n_critic.
    """

    Settings = WGANGPSettings
    words = Words(
        "WGAN-GP",
        curves={"distance": "estimate of the Wasserstein distance", "penalty": "E (‖∇D‖ − 1)²"},
        about_curves="The distance falls as samples improve; it rises first, as long as the critic learns faster.",
        advice="a critic fails where its penalty rises: raise --model.penalty or lower --discriminator-optimizer.lr",
    )
    settings: WGANGPSettings

    def __init__(self, shape: Sequence[int], settings: WGANGPSettings = WGANGPSettings()) -> None:
        super().__init__(shape, settings, norm="layer")

    def phases(self) -> tuple[Phase, ...]:
        """The critic in every step, then the generator in some."""
        every = self.settings.critic_steps
        return (
            Phase(self.criticise, moves=("discriminator",), minimises="discriminator_loss", gradients=True),
            Phase(self.deceive, moves=("generator",), minimises="generator_loss", every=every, gradients=True),
        )

    def criticise(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss of D for a batch x (B, C, H, W) in [0, 1], and its terms; `generator` is the source of z and ε."""
        self._check_batch("x", x)
        with torch.no_grad():
            y = self.generated(x, generator)
        return critic_losses(self.discriminator, x, [y], self.settings.penalty, generator)

    def deceive(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss of G, for as many samples as there are images x (B, C, H, W)."""
        return {"generator_loss": -frozen(self.discriminator, self.generated(x, generator)).mean()}
