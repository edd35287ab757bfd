"""Variational autoencoder with a normal prior, posterior and likelihood, and a weight β on the divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from glf_fast.models.latent import ExPostModel, ExPostSettings
from glf_fast.models.model import Words
from glf_fast.settings import POSITIVE, Rule

__all__ = ["VAE", "VAESettings"]


@dataclass(frozen=True)
class VAESettings(ExPostSettings):
    """Variational autoencoder."""

    name: str = "vae"
    """Name of the model."""
    beta: float = 1.0
    """Weight of the divergence between posterior and prior."""

    RULES: ClassVar[Mapping[str, Rule]] = {**ExPostSettings.RULES, "beta": POSITIVE}

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions, β = {self.beta:g}"


class VAE(ExPostModel):
    """Variational autoencoder (Kingma, Welling, arXiv:1312.6114), with β as in Higgins et al., ICLR 2017.

    For an image x the encoder gives the mean μ and the log-variance of the code, and the decoder D gives the mean of an image.
    All images have the same variance s². The loss is β·KL(N(μ, σ²) ‖ N(0, I)) − log N(x; D(z), s²), z = μ + σ·ε, ε ~ N(0, I).
    For every batch the optimal s² is used, the mean squared error of the batch (σ-VAE, Rybkin et al., arXiv:2006.13202).
    `log_likelihood` uses an average of s² over about the last hundred batches.
    """

    Settings = VAESettings
    words = Words(
        "VAE",
        curves={"reconstruction": "squared error per image", "loss": "β·KL − log-likelihood, in nats per image"},
        likelihood="lower bound (ELBO), one sample of the posterior",
    )
    settings: VAESettings
    variance: Tensor
    batches: Tensor

    def __init__(self, shape: Sequence[int], settings: VAESettings = VAESettings()) -> None:
        super().__init__(shape, settings, numbers=2)
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("batches", torch.zeros(()))

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch x (B, C, H, W) in [0, 1]: the loss, and its terms per image."""
        self._check_batch("x", x)
        errors, divergences = self._errors(x, generator)
        error, divergence = errors.mean(), divergences.mean()
        # The variance of rounding to grey levels is the least variance that data can have.
        variance = error.detach() / x[0].numel() + 255**-2 / 12
        if self.training:  # a young average forgets faster: the first batch replaces the 1 above
            self.variance.lerp_(variance, (10 / (10 + self.batches)).clamp(min=0.01))
            self.batches += 1
        loss = _nll(error, x[0].numel(), variance) + self.settings.beta * divergence
        return {"loss": loss, "reconstruction": error, "divergence": divergence}

    def _errors(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """‖D(z) − x‖² with a sample z of the posterior, and KL(posterior ‖ prior) in nats, both (B,)."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        errors = (self.decoder(mean + (0.5 * log_variance).exp() * noise) - x).square().flatten(1).sum(1)
        return errors, 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)

    def encode(self, x: Tensor) -> Tensor:
        """Mean codes μ (B, latent_dim) of images x (B, C, H, W) in [0, 1]."""
        return super().encode(x).chunk(2, 1)[0]

    def log_likelihood(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """log N(x; D(z), s²) − KL, (B,), in nats, with one sample z of the posterior: on average a lower bound of log p(x)."""
        self._check_batch("x", x)
        with self.evaluating():
            errors, divergences = self._errors(x, generator)
            return -_nll(errors, x[0].numel(), self.variance) - divergences


def _nll(error: Tensor, pixels: int, variance: Tensor) -> Tensor:
    """−log N(x; y, s²) of x with ‖x − y‖² = `error`, in nats."""
    return 0.5 * (pixels * (math.log(2 * math.pi) + variance.log()) + error / variance)
