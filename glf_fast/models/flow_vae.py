"""Variational autoencoder whose prior, posterior or both are normalizing flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from glf_fast.models.arc import flow_arc
from glf_fast.models.flow_settings import FlowSettings
from glf_fast.models.model import Words
from glf_fast.models.vae import VAE, VAESettings
from glf_fast.models.variational import log_normal
from glf_fast.settings import AT_LEAST_2, Rule

__all__ = ["FlowVAE", "FlowVAESettings"]


@dataclass(frozen=True)
class FlowVAESettings(VAESettings):
    """Variational autoencoder with a flow as prior, posterior or both; the settings of the flows are a table of their own."""

    name: str = "flow-vae"
    """Name of the model."""
    prior: Literal["normal", "flow"] = "flow"
    """Distribution of the codes. normal: N(0, I); flow: a normalizing flow."""
    posterior: Literal["normal", "flow"] = "normal"
    """Distribution of the code of an image. normal: the encoder's; flow: a flow, given the encoder's numbers, of the
    encoder's."""
    flow: FlowSettings = FlowSettings()  # noqa: RUF009 - frozen

    RULES: ClassVar[Mapping[str, Rule]] = {**VAESettings.RULES, "latent_dim": AT_LEAST_2}  # a coupling needs two halves

    def mistake(self) -> str:
        """A message if there is no flow, or one that takes no context, else ""."""
        if self.prior == self.posterior == "normal":
            return (
                'prior and posterior are both "normal", so there is no flow; choose "flow" for one, or the model "vae"'
            )
        if self.posterior == "flow" and self.flow.kind == "rnvp":
            return 'posterior = "flow" needs a flow with a context; flow.kind = "rnvp" has none, "coupling" has one'
        return ""

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        flows = " and ".join(name for name in ("prior", "posterior") if getattr(self, name) == "flow")
        return f"{super().summary()}, {self.flow.kind} flow as {flows}"


class FlowVAE(VAE):
    """VAE with a flow as prior or posterior, the stochastic relatives of GLF (Xiao, Yan, Amit, arXiv:1905.10485).

    The loss is −log N(x; D(z), s²) + β·[log q(z|x) − log p(z)] with one sample z of the posterior, and

    * prior = "flow": log p(z) = log N(F(z); 0, I) + log|det ∂F/∂z|. As in the authors' code, and unlike in GLF, no gradient is
      stopped: the encoder also learns to make its codes likely.
    * posterior = "flow": z = G(ε̃; h), ε̃ = μ + σ·ε, ε ~ N(0, I), with the encoder's numbers h = (μ, log σ²) also the context of
      every coupling; log q(z|x) = log N(ε̃; μ, σ²) − log|det ∂G/∂ε̃|. One pass through G, in the direction in which flows are
      fastest, gives both. (Normalizing flows: Rezende, Mohamed, arXiv:1505.05770; with a context of the encoder: Kingma et al.,
      arXiv:1606.04934.) The authors' code of a VAE with flow posterior was not released.

    As s → 0 (β of the GLF paper → ∞) the squared errors outweigh the divergence, the posterior's noise vanishes, and the loss
    with a flow prior becomes that of GLF; tools/noise_study.py measures this.

    `encode` gives the code of ε = 0. Interpolations with a flow prior are arcs in its Gaussian space, as in GLF.
    """

    Settings = FlowVAESettings
    groups = ("autoencoder", "flow")
    words = Words(
        "VAE with flows",
        interpolations="From one test image to another; if the prior is a flow, along an arc in its Gaussian space.",
        curves=VAE.words.curves,
    )
    settings: FlowVAESettings

    def __init__(self, shape: Sequence[int], settings: FlowVAESettings = FlowVAESettings()) -> None:
        super().__init__(shape, settings)
        dim, flow = settings.latent_dim, settings.flow
        self.prior = flow.build(dim) if settings.prior == "flow" else None
        self.posterior = flow.build(dim, context_dim=2 * dim) if settings.posterior == "flow" else None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"autoencoder": encoder, decoder and a learned variance, "flow": the flows of prior and posterior}."""
        flows = [flow for flow in (self.prior, self.posterior) if flow is not None]
        return {**super().parameter_groups(), "flow": [p for flow in flows for p in flow.parameters()]}

    def _posterior(self, h: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        z, log_q = super()._posterior(h, generator)
        if self.posterior is None:
            return z, log_q
        z, logdet = self.posterior(z, h)
        return z, log_q - logdet

    def _log_prior(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return log_normal(z) if self.prior is None else self.prior.log_prob(z)

    def _divergences(self, h: Tensor, z: Tensor, log_q: Tensor) -> Tensor:
        return log_q - self._log_prior(z)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, latent_dim) of images x (B, C, H, W) in [0, 1] without the posterior's noise."""
        self._check_batch("x", x)
        h = self.encoder(x)
        mean = h.chunk(2, 1)[0]
        return mean if self.posterior is None else self.posterior(mean, h)[0]

    def sample_prior(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """n codes (n, latent_dim) of the prior."""
        if self.prior is None:
            return super().sample_prior(n, temperature=temperature, generator=generator)
        return self.prior.sample(n, temperature=temperature, generator=generator)

    def interpolate_codes(self, z0: Tensor, z1: Tensor, steps: int) -> Tensor:
        """Codes (B, steps, latent_dim) from z0 to z1 (B, latent_dim): on an arc in a flow prior's noise, else on a line."""
        if self.prior is None:
            return super().interpolate_codes(z0, z1, steps)
        return flow_arc(self.prior, z0, z1, steps)
