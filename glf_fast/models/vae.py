"""Variational autoencoder with a normal prior, posterior and likelihood, and a weight β on the divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from glf_fast.models.autoencoder import Decoder, Encoder, check_image_shape
from glf_fast.models.model import GenerativeModel, ModelSettings, Phase, Words
from glf_fast.settings import POSITIVE, Rule

__all__ = ["VAE", "VAESettings"]


@dataclass(frozen=True)
class VAESettings(ModelSettings):
    """Variational autoencoder."""

    name: str = "vae"
    """Name of the model."""
    latent_dim: int = 20
    """Length of a code, the dimension of the latent space."""
    width: int = 64
    """Channels after the encoder's first convolution."""
    hidden: int = 1024
    """Units of the dense layer in encoder and decoder."""
    beta: float = 1.0
    """Weight of the divergence between posterior and prior."""

    RULES: ClassVar[Mapping[str, Rule]] = dict.fromkeys(("latent_dim", "width", "hidden", "beta"), POSITIVE)

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions, β = {self.beta:g}"


class VAE(GenerativeModel):
    """Variational autoencoder (Kingma, Welling, arXiv:1312.6114), with β as in Higgins et al., ICLR 2017.

    For an image x the encoder gives the mean μ and the log-variance of the code, and the decoder D gives the mean of an image.
    All images have the same variance s². The loss is β·KL(N(μ, σ²) ‖ N(0, I)) − log N(x; D(z), s²), z = μ + σ·ε, ε ~ N(0, I).
    For every batch the optimal s² is used, the mean squared error of the batch (σ-VAE, Rybkin et al., arXiv:2006.13202).
    `log_likelihood` uses an average of s² over about the last hundred batches.
    """

    Settings = VAESettings
    groups = ("autoencoder",)
    words = Words(
        "VAE",
        curves={"reconstruction": "squared error per image", "loss": "β·KL − log-likelihood, in nats per image"},
        likelihood="lower bound (ELBO), one sample of the posterior",
    )
    settings: VAESettings
    variance: Tensor
    batches: Tensor

    def __init__(self, shape: Sequence[int], settings: VAESettings = VAESettings()) -> None:
        super().__init__(check_image_shape(shape), settings)
        self.encoder = Encoder(shape, 2 * settings.latent_dim, settings.width, settings.hidden)
        self.decoder = Decoder(shape, settings.latent_dim, settings.width, settings.hidden)
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

    def phases(self) -> tuple[Phase, ...]:
        """A single phase, which trains all parameters by the same loss."""
        return (Phase(self.losses, moves=self.groups),)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"autoencoder": encoder and decoder}."""
        return {"autoencoder": list(self.parameters())}

    def encode(self, x: Tensor) -> Tensor:
        """Mean codes μ (B, latent_dim) of images x (B, C, H, W) in [0, 1]."""
        self._check_batch("x", x)
        return self.encoder(x).chunk(2, 1)[0]

    def reconstruct(self, x: Tensor) -> Tensor:
        """D(μ(x)) for x (B, C, H, W) in [0, 1], in eval mode and without gradients or noise."""
        with self.evaluating():
            return self.decoder(self.encode(x))

    def log_likelihood(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """log N(x; D(z), s²) − KL, (B,), in nats, with one sample z of the posterior: on average a lower bound of log p(x)."""
        self._check_batch("x", x)
        with self.evaluating():
            errors, divergences = self._errors(x, generator)
            return -_nll(errors, x[0].numel(), self.variance) - divergences

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n images D(z), z ~ temperature·N(0, I): (n, C, H, W) in [0, 1], in eval mode and without gradients."""
        like = next(self.parameters())
        with self.evaluating():
            shape = (n, self.settings.latent_dim)
            z = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
            return self.decoder(temperature * z)

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """Images (B, steps, C, H, W) on a line between the mean codes, from each reconstructed x0 to its x1 (B, C, H, W)."""
        with self.evaluating():
            z0, z1 = (self.encode(x)[:, None] for x in (x0, x1))
            z = torch.lerp(z0, z1, torch.linspace(0, 1, steps, device=z0.device, dtype=z0.dtype)[:, None])
            return self.decoder(z.flatten(0, 1)).unflatten(0, (len(x0), steps))


def _nll(error: Tensor, pixels: int, variance: Tensor) -> Tensor:
    """−log N(x; y, s²) of x with ‖x − y‖² = `error`, in nats."""
    return 0.5 * (pixels * (math.log(2 * math.pi) + variance.log()) + error / variance)
