"""Two-stage VAE: a second, small VAE learns the distribution of the codes of the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from glf_fast.models.model import Phase, Stage, Words
from glf_fast.models.variational import (
    LearnedVariance,
    VariationalModel,
    VariationalSettings,
    draw,
    log_normal,
    nll,
    normal_divergence,
)
from glf_fast.settings import POSITIVE, Rule, Settings

__all__ = ["SecondStageSettings", "TwoStageVAE", "TwoStageVAESettings"]


@dataclass(frozen=True)
class SecondStageSettings(Settings):
    """The second VAE."""

    hidden: tuple[int, ...] = (1024, 1024, 1024)
    """Widths of the hidden layers of its encoder and its decoder."""
    epochs: int = 20
    """Passes over the codes."""

    RULES: ClassVar[Mapping[str, Rule]] = {
        "hidden": (lambda value: len(value) > 0 and min(value) > 0, "at least one positive width"),
        "epochs": POSITIVE,
    }


@dataclass(frozen=True)
class TwoStageVAESettings(VariationalSettings):
    """Two variational autoencoders, of images and of their codes; the settings of the second are a table of their own."""

    name: str = "two-stage-vae"
    """Name of the model."""
    variance: Literal["batch", "fixed", "learned"] = "learned"
    """Variance of the pixels around a decoded image. batch: the mean squared error of each batch; fixed: deviation²; learned:
    a parameter."""
    second_stage: SecondStageSettings = SecondStageSettings()


class SecondStage(nn.Module):
    """A VAE of codes z (B, D): p(u) = N(0, I), p(z|u) = N(D₂(u), γ²), with u as long as z.

    Encoder and decoder are MLPs with ReLU whose last layer sees the input beside the last hidden layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.decoder = _SkipMLP(dim, hidden, 2 * dim), _SkipMLP(dim, hidden, dim)
        self.learned = LearnedVariance()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def standardise(self, h: Tensor) -> None:
        """Set mean and standard deviation of z ~ N(μ, σ²) over the rows h = (μ, log σ²) (N, 2·D)."""
        mean, log_variance = h.double().chunk(2, 1)
        self.mean.copy_(mean.mean(0))
        variance = mean.var(0, correction=0) + log_variance.exp().mean(0)
        self.std.copy_(variance.sqrt())

    def losses(self, z: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Scalars of a batch of codes z (B, D), standardised first."""
        y = (z - self.mean) / self.std
        h = self.encoder(y)
        u, _ = draw(h, generator)
        error, divergence, variance = self._errors(u, y).mean(), normal_divergence(h).mean(), self.learned()
        return {
            "second_loss": nll(error, z.shape[1], variance) + divergence,
            "second_reconstruction": error,
            "second_divergence": divergence,
            "second_deviation": variance.sqrt(),
        }

    def log_weight(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """log p(z|u)·p(u)/q(u|z) for a sample u of q(u|z), (B,): its exponential is p(z) on average."""
        y = (z - self.mean) / self.std
        u, log_q = draw(self.encoder(y), generator)
        log_likelihood = -nll(self._errors(u, y), z.shape[1], self.learned()) - self.std.log().sum()
        return log_likelihood + log_normal(u) - log_q

    def sample(self, u: Tensor, noise: Tensor) -> Tensor:
        """Codes z (N, D) = D₂(u) + γ·noise, of the scale of the first VAE's codes."""
        return self.mean + self.std * (self.decoder(u) + self.learned().sqrt() * noise)

    def _errors(self, u: Tensor, y: Tensor) -> Tensor:
        return (self.decoder(u) - y).square().sum(1)


class TwoStageVAE(VariationalModel):
    """Two-stage VAE (Dai, Wipf, arXiv:1903.05789).

    The first stage is a VAE of images with a learned variance γ² of the pixels, see `VariationalModel`. As γ falls, the codes
    fill the latent space less and less like the prior N(0, I). The second stage, with the first one frozen, is a VAE of codes z
    that are drawn anew from q(z|x) in each step, with a learned variance of its own. A sample is x = D(z), z ~ N(D₂(u), γ₂²),
    u ~ N(0, I).

    The networks of the second stage are those of the released code. Here γ is a standard deviation, as in the code; in the
    paper it is a variance. Codes are standardised before the second stage, as Ghosh et al. do (arXiv:1903.12436); paper and
    released code do not.

    `log_likelihood` bounds the likelihood of both stages: p(z) is the second stage's.
    """

    Settings = TwoStageVAESettings
    groups = ("autoencoder", "second_stage")
    words = Words(
        "Two-stage VAE",
        curves={
            "reconstruction": "squared error per image",
            "loss": "β·KL − log-likelihood, in nats per image",
            "second_loss": "the same of the second stage, in nats per code",
        },
    )
    sampling_modes: ClassVar[Mapping[str, str]] = {
        "prior": "codes of the first stage from N(0, I) instead of the second stage"
    }
    settings: TwoStageVAESettings

    def __init__(self, shape: Sequence[int], settings: TwoStageVAESettings = TwoStageVAESettings()) -> None:
        super().__init__(shape, settings)
        self.second_stage = SecondStage(settings.latent_dim, settings.second_stage.hidden)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"autoencoder": encoder, decoder and a learned variance, "second_stage": the VAE of codes}."""
        return {**super().parameter_groups(), "second_stage": list(self.second_stage.parameters())}

    def phases(self) -> tuple[Phase, ...]:
        """A single phase, which trains the first VAE."""
        return (Phase(self.losses, moves=("autoencoder",)),)

    def stages(self) -> tuple[Stage, ...]:
        """Training of the first VAE; mean and deviation of its codes; training of the second VAE."""
        second = Phase(self.second_losses, moves=("second_stage",), minimises="second_loss")
        return (
            Stage(self.phases()),
            Stage(inputs=self.encoder, fit=self.second_stage.standardise),
            Stage((second,), epochs=self.settings.second_stage.epochs, inputs=self.encoder),
        )

    def second_losses(self, h: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch of posteriors h = (μ, log σ²) (B, 2·latent_dim), of which codes are drawn."""
        return self.second_stage.losses(draw(h, generator)[0], generator)

    def _log_prior(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.second_stage.log_weight(z, generator)

    def sample_codes(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n codes (n, latent_dim) of the second stage; of N(0, I) in mode "prior"."""
        u = super().sample_codes(n, temperature=temperature, generator=generator)
        if mode == "prior":
            return u
        return self.second_stage.sample(u, super().sample_codes(n, temperature=temperature, generator=generator))


class _SkipMLP(nn.Module):
    """x (B, n) → Linear([x, MLP(x)]) (B, m), with ReLU."""

    def __init__(self, n: int, hidden: Sequence[int], m: int) -> None:
        super().__init__()
        widths = (n, *hidden)
        layers = [nn.Linear(a, b) for a, b in zip(widths, hidden, strict=False)]
        self.layers = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        self.head = nn.Linear(n + widths[-1], m)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # these networks are small, and their outputs are variances
            return self.head(torch.cat([x, self.layers(x)], 1))
