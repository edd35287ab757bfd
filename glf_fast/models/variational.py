"""Base class of the variational autoencoders: normal likelihood, normal posterior, and bounds on the likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glf_fast.models.latent import LatentModel, LatentSettings
from glf_fast.models.whole_batch import noise_like, whole
from glf_fast.settings import POSITIVE, Rule

__all__ = [
    "LearnedVariance",
    "VariationalModel",
    "VariationalSettings",
    "draw",
    "log_normal",
    "nll",
    "normal_divergence",
]

# The variance of rounding to grey levels, the least variance that pixels can have.
_ROUNDING = 255**-2 / 12


@dataclass(frozen=True)
class VariationalSettings(LatentSettings):
    """A variational autoencoder."""

    variance: Literal["batch", "fixed", "learned"] = "batch"
    """Variance of the pixels around a decoded image. batch: the mean squared error of each batch; fixed: deviation²; learned:
    a parameter."""
    deviation: float = 0.1
    """For variance fixed: standard deviation s of the pixels, which are in [0, 1]; squared errors have the weight 1/(2·s²)."""
    beta: float = 1.0
    """Weight of the divergence between posterior and prior."""
    importance_samples: int = 1
    """Samples of the posterior for each estimate of the likelihood. 1: the ELBO; more: the tighter bound of IWAE."""

    RULES: ClassVar[Mapping[str, Rule]] = {
        **LatentSettings.RULES,
        "deviation": POSITIVE,
        "beta": POSITIVE,
        "importance_samples": POSITIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with this kind of variance, by name."""
        return {k: v for k, v in super().effective().items() if k != "deviation" or self.variance == "fixed"}

    def choice(self, name: str) -> str:
        """The field that decides whether the field `name` has an effect."""
        return "variance" if name == "deviation" else super().choice(name)

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        variance = f"s = {self.deviation:g}" if self.variance == "fixed" else f"{self.variance} variance"
        return f"{self.latent_dim} latent dimensions, {variance}, β = {self.beta:g}"


class LearnedVariance(nn.Module):
    """The variance γ² of a normal likelihood as a parameter (Dai, Wipf, arXiv:1903.05789, who write γ for the variance).

    It begins at 1. The parameter is log(γ)/10: Adam moves a parameter by at most about its learning rate in a step, and log γ
    itself would take 2,300 steps of 10⁻³ from 1 to 0.1.

    Args:
        least: number that is added to γ², so that a perfect reconstruction does not make the likelihood infinite.
    """

    def __init__(self, least: float = _ROUNDING) -> None:
        super().__init__()
        self.least = least
        self.log_deviation = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        """γ², ()."""
        return (20 * self.log_deviation).exp() + self.least


class VariationalModel(LatentModel):
    """A variational autoencoder (Kingma, Welling, arXiv:1312.6114), with β as in Higgins et al., ICLR 2017.

    For an image x the encoder gives the mean μ and the log-variance of the posterior q(z|x) = N(μ, σ²) of the code, and the
    decoder D gives the mean of an image. All pixels have the same variance s² around it. The loss is

        β·KL(q(z|x) ‖ p(z)) − log N(x; D(z), s²),        z = μ + σ·ε,  ε ~ N(0, I),

    with the prior p(z) = N(0, I). A subclass with another posterior replaces `_posterior`, with another prior `_log_prior`; for
    either it replaces `_divergences`.
    """

    settings: VariationalSettings
    variance: Tensor
    batches: Tensor

    def __init__(self, shape: Sequence[int], settings: VariationalSettings) -> None:
        super().__init__(shape, settings, numbers=2)
        kind, count = self.settings.variance, self.settings.importance_samples
        self.learned = LearnedVariance() if kind == "learned" else None
        if kind != "learned":
            self.register_buffer("variance", torch.full((), self.settings.deviation**2 if kind == "fixed" else 1.0))
        if kind == "batch":
            self.register_buffer("batches", torch.zeros(()))
        bound = "lower bound (ELBO), one sample of the posterior"
        if count > 1:
            bound = f"lower bound (importance-weighted, IWAE), {count} samples of the posterior"
        self.words = replace(self.words, likelihood=bound)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"autoencoder": encoder, decoder and a learned variance}."""
        groups = super().parameter_groups()
        if self.learned is not None:
            groups["autoencoder"] += self.learned.parameters()
        return groups

    # -- training ------------------------------------------------------------------------------------------------------

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch x (B, C, H, W) in [0, 1]: the loss, and its terms per image in nats; `deviation` is s."""
        self._check_batch("x", x)
        h = self.encoder(x)
        z, log_q = self._posterior(h, generator)
        errors = self._errors(z, x)
        error, divergence = errors.mean(), self._divergences(h, z, log_q).mean()
        if self.settings.variance == "batch":
            variance = whole(errors.detach()).mean() / x[0].numel() + _ROUNDING
        else:
            variance = self._variance()
        if self.training and self.settings.variance == "batch":
            # A young average forgets faster: the first batch replaces the 1 of the start.
            self.variance.lerp_(variance, (10 / (10 + self.batches)).clamp(min=0.01))
            self.batches += 1
        return {
            "loss": nll(error, x[0].numel(), variance) + self.settings.beta * divergence,
            "reconstruction": error,
            "divergence": divergence,
            "deviation": variance.sqrt(),
        }

    def _variance(self) -> Tensor:
        """s², (); with the variance of each batch an average over about the last hundred batches."""
        return self.variance if self.learned is None else self.learned()

    def _errors(self, z: Tensor, x: Tensor) -> Tensor:
        """‖D(z) − x‖², (B,)."""
        return (self.decoder(z) - x).square().flatten(1).sum(1)

    def _posterior(self, h: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A code z of the posterior that the encoder gives as h (B, 2·latent_dim), and log q(z|x), (B,)."""
        return draw(h, generator)

    def _log_prior(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """log p(z), (B,), or an estimate whose exponential is unbiased."""
        return log_normal(z)

    def _divergences(self, h: Tensor, z: Tensor, log_q: Tensor) -> Tensor:
        """KL(q(z|x) ‖ p(z)), (B,), or an unbiased estimate from a sample z."""
        return normal_divergence(h)

    # -- use -----------------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Mean codes μ (B, latent_dim) of images x (B, C, H, W) in [0, 1]."""
        return super().encode(x).chunk(2, 1)[0]

    def log_likelihood(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """log (1/k)·Σ_i p(x|z_i)·p(z_i)/q(z_i|x), (B,), in nats, with k = `importance_samples` samples z_i of the posterior.

        On average it is a lower bound of log p(x), and rises with k: the ELBO for k = 1, else the bound of IWAE (Burda,
        Grosse, Salakhutdinov, arXiv:1509.00519, equation 8). Memory does not depend on k.
        """
        self._check_batch("x", x)
        with self.evaluating():
            h, count = self.encoder(x), self.settings.importance_samples
            total = x.new_full((len(x),), -math.inf)
            for _ in range(count):
                z, log_q = self._posterior(h, generator)
                log_likelihood = -nll(self._errors(z, x), x[0].numel(), self._variance())
                total = torch.logaddexp(total, log_likelihood + self._log_prior(z, generator) - log_q)
            return total - math.log(count)


def draw(h: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A sample z of N(μ, σ²) for h = (μ, log σ²) (B, 2·D), and its log-density, (B,)."""
    mean, log_variance = h.chunk(2, 1)
    noise = noise_like(mean, generator)
    return mean + (0.5 * log_variance).exp() * noise, log_normal(noise) - 0.5 * log_variance.sum(1)


def normal_divergence(h: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)), (B,), in nats, for h = (μ, log σ²) (B, 2·D)."""
    mean, log_variance = h.chunk(2, 1)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I), (B,), of z (B, D)."""
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


def nll(error: Tensor, numbers: int, variance: Tensor) -> Tensor:
    """−log N(x; y, s²) in nats, of x with so many numbers and ‖x − y‖² = `error`."""
    return 0.5 * (numbers * (math.log(2 * math.pi) + variance.log()) + error / variance)
