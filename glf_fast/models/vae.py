"""Variational autoencoder with a normal prior, posterior and likelihood, and a weight β on the divergence."""

from __future__ import annotations

from dataclasses import dataclass

from glf_fast.models.latent import ExPostModel, ExPostSettings
from glf_fast.models.model import Words
from glf_fast.models.variational import VariationalModel, VariationalSettings

__all__ = ["VAE", "VAESettings"]


@dataclass(frozen=True)
class VAESettings(VariationalSettings, ExPostSettings):
    """Variational autoencoder."""

    name: str = "vae"
    """Name of the model."""


class VAE(VariationalModel, ExPostModel):
    """Variational autoencoder (Kingma, Welling, arXiv:1312.6114), with β as in Higgins et al., ICLR 2017.

    See `VariationalModel` for the loss β·KL(N(μ, σ²) ‖ N(0, I)) − log N(x; D(z), s²). After training a density can be fitted to
    the mean codes, from which samples are then drawn (Ghosh et al., arXiv:1903.12436); `log_likelihood` keeps the prior.

    Args:
        shape: (C, H, W) of the images, H and W multiples of 4.
        settings: see `VAESettings`. For the setting

            variance: "batch" uses the optimal s² of every batch, its mean squared error (σ-VAE, Rybkin et al.,
                arXiv:2006.13202), and for `log_likelihood` an average over about the last hundred batches. "learned" is the γ
                of Dai and Wipf (arXiv:1903.05789), see `LearnedVariance`.
            deviation: "fixed" uses this s. The GLF paper (arXiv:1905.10485) weights the squared error of an image by β instead
                of the divergence; the same loss has s = 1/√(2β): its β = 400 is s = 0.0354, here with beta = 1.
    """

    Settings = VAESettings
    words = Words(
        "VAE",
        curves={"reconstruction": "squared error per image", "loss": "β·KL − log-likelihood, in nats per image"},
    )
    settings: VAESettings
