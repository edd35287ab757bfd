"""Base classes of the models that have an encoder, a decoder and a distribution of codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glf_fast.models.autoencoder import Decoder, Encoder, check_image_shape
from glf_fast.models.convolutional import ConvolutionalDecoder, ConvolutionalEncoder
from glf_fast.models.dcgan_networks import DCGANDecoder, DCGANEncoder
from glf_fast.models.density import DensitySettings
from glf_fast.models.model import GenerativeModel, ModelSettings, Phase, Stage
from glf_fast.settings import POSITIVE, Rule

__all__ = ["DecoderModel", "ExPostModel", "ExPostSettings", "LatentModel", "LatentSettings", "decoder", "encoder"]

# Batch size of sampling. It bounds memory, and is part of a protocol of GLF's authors, which uses batch statistics.
SAMPLE_BATCH = 500


@dataclass(frozen=True)
class LatentSettings(ModelSettings):
    """A model with an autoencoder."""

    latent_dim: int = 20
    """Length of a code, the dimension of the latent space."""
    width: int = 64
    """Channels after the encoder's first convolution."""
    hidden: int = 1024
    """For networks infogan: units of the dense layer in encoder and decoder."""
    networks: Literal["infogan", "rae", "dcgan"] = "infogan"
    """Encoder and decoder. infogan: two convolutions and a dense layer (GLF's paper); rae: four convolutions (RAE's paper, with
    width 128); dcgan: convolutions alone, down to at least 4 × 4 pixels."""

    CHOICE: ClassVar[str] = "networks"
    RULES: ClassVar[Mapping[str, Rule]] = dict.fromkeys(("latent_dim", "width", "hidden"), POSITIVE)

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with these networks, by name."""
        without = () if self.networks == "infogan" else ("hidden",)
        return {name: value for name, value in super().effective().items() if name not in without}


def encoder(shape: Sequence[int], settings: LatentSettings, numbers: int = 1) -> nn.Module:
    """The encoder of these settings, which gives `numbers` numbers for each dimension of a code."""
    if settings.networks == "rae":
        return ConvolutionalEncoder(shape, numbers * settings.latent_dim, settings.width)
    if settings.networks == "dcgan":
        return DCGANEncoder(shape, numbers * settings.latent_dim, settings.width)
    return Encoder(shape, numbers * settings.latent_dim, settings.width, settings.hidden)


def decoder(shape: Sequence[int], settings: LatentSettings) -> nn.Module:
    """The decoder of these settings."""
    if settings.networks == "rae":
        return ConvolutionalDecoder(shape, settings.latent_dim, settings.width)
    if settings.networks == "dcgan":
        return DCGANDecoder(shape, settings.latent_dim, settings.width)
    return Decoder(shape, settings.latent_dim, settings.width, settings.hidden)


class DecoderModel(GenerativeModel):
    """A model of images with a decoder D and a distribution of codes, from which it samples.

    A subclass builds `decoder`, and may replace `sample_codes` (by default N(0, I)).
    """

    settings: LatentSettings
    decoder: nn.Module

    def decode(self, z: Tensor) -> Tensor:
        """Codes z (B, latent_dim) → images (B, C, H, W) in [0, 1]."""
        return self.decoder(z)

    def sample_codes(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n codes (n, latent_dim) of the model's distribution; arguments are those of `sample`."""
        like = next(self.parameters())
        shape = (n, self.settings.latent_dim)
        return temperature * torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n images D(z) of codes z from `sample_codes`: (n, C, H, W) in [0, 1], in eval mode and without gradients.

        Args:
            temperature: standard deviation of the noise; a value below 1 gives more typical but less varied samples.
            generator: source of the noise, on the model's device; the global generator if None.
            mode: one of `sampling_modes`, or "" for the usual way.
        """
        self.check_mode(mode)
        options: dict[str, Any] = {"temperature": temperature, "generator": generator, "mode": mode}
        sizes = [min(SAMPLE_BATCH, n - start) for start in range(0, n, SAMPLE_BATCH) or [0]]
        with self.evaluating():
            return torch.cat([self.decode(self.sample_codes(size, **options)) for size in sizes])


class LatentModel(DecoderModel):
    """A model of images with an encoder E to codes, a decoder D and a distribution of codes, from which it samples.

    A subclass may replace `encode`, if E gives more than a code, `sample_codes` (by default N(0, I)) and `interpolate_codes`.

    Args:
        shape: (C, H, W) of the images, H and W multiples of 4; with `networks` rae, of 8 from 64 pixels on.
        settings: of the networks.
        numbers: numbers that E gives for each dimension of a code; 2 for a mean and a log-variance.
    """

    groups: ClassVar[tuple[str, ...]] = ("autoencoder",)

    def __init__(self, shape: Sequence[int], settings: LatentSettings, numbers: int = 1) -> None:
        super().__init__(shape, settings)
        self.encoder, self.decoder = self.networks(numbers)

    def networks(self, numbers: int) -> tuple[nn.Module, nn.Module]:
        """Encoder, which gives `numbers` numbers for each dimension of a code, and decoder."""
        check_image_shape(self.shape)
        return encoder(self.shape, self.settings, numbers), decoder(self.shape, self.settings)

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch x (B, C, H, W) in [0, 1]; "loss" is to be back-propagated."""
        raise NotImplementedError

    def phases(self) -> tuple[Phase, ...]:
        """A single phase, which trains all parameters by the same loss."""
        return (Phase(self.losses, moves=self.groups),)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"autoencoder": encoder and decoder}."""
        return {"autoencoder": [*self.encoder.parameters(), *self.decoder.parameters()]}

    def encode(self, x: Tensor) -> Tensor:
        """Images x (B, C, H, W) in [0, 1] → codes z (B, latent_dim)."""
        self._check_batch("x", x)
        return self.encoder(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """D(E(x)) for x (B, C, H, W) in [0, 1], in eval mode and without gradients or noise."""
        with self.evaluating():
            return self.decode(self.encode(x))

    def interpolate_codes(self, z0: Tensor, z1: Tensor, steps: int) -> Tensor:
        """Codes (B, steps, latent_dim) on a line from each code z0 to its z1 (B, latent_dim)."""
        return torch.lerp(
            z0[:, None], z1[:, None], torch.linspace(0, 1, steps, device=z0.device, dtype=z0.dtype)[:, None]
        )

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """Images (B, steps, C, H, W) D(z) of `interpolate_codes`, from each reconstructed x0 to its x1 (B, C, H, W)."""
        if steps < 2:
            raise ValueError(f"steps counts both ends, so steps must be ≥ 2; got {steps}")
        with self.evaluating():
            z = self.interpolate_codes(self.encode(x0), self.encode(x1), steps)
            return self.decode(z.flatten(0, 1)).unflatten(0, (len(x0), steps))


@dataclass(frozen=True)
class ExPostSettings(LatentSettings):
    """A model to whose codes a density can be fitted after training; the settings of the density are a table of their own."""

    density: DensitySettings = DensitySettings()  # noqa: RUF009 - frozen


class ExPostModel(LatentModel):
    """A model that draws codes from a density fitted to the codes of the training set, when the autoencoder has been trained.

    Ex-post density estimation, Ghosh et al., arXiv:1903.12436, section 4. It is a stage of its own, which ends training. With
    `density.kind = "none"` codes are drawn from the prior, `sample_prior`.
    """

    sampling_modes: ClassVar[Mapping[str, str]] = {"prior": "codes from the prior instead of the fitted density"}
    settings: ExPostSettings

    def __init__(self, shape: Sequence[int], settings: ExPostSettings, numbers: int = 1) -> None:
        super().__init__(shape, settings, numbers)
        self.density = settings.density.build(settings.latent_dim)

    def stages(self) -> tuple[Stage, ...]:
        """Training by the phases; then, if there is a density, its fit to the codes."""
        first = Stage(self.phases())
        return (first,) if self.density is None else (first, Stage(inputs=self.encode, fit=self.density.fit))

    def sample_prior(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """n codes (n, latent_dim) of the prior, by default N(0, I)."""
        return super().sample_codes(n, temperature=temperature, generator=generator)

    def sample_codes(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n codes (n, latent_dim) of the density; of the prior without a density and in mode "prior"."""
        if self.density is None or mode == "prior":
            return self.sample_prior(n, temperature=temperature, generator=generator)
        return self.density.sample(n, temperature=temperature, generator=generator)
