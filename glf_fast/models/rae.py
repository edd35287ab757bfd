"""Regularised autoencoder: a deterministic autoencoder, and a density that is fitted to its codes after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from glf_fast.models.density import DensitySettings
from glf_fast.models.latent import ExPostModel, ExPostSettings
from glf_fast.models.model import Words
from glf_fast.models.reconstruction import reconstruction_loss
from glf_fast.models.regularizers import decode_with_penalty, squared_weights
from glf_fast.models.spectral import spectral_norm
from glf_fast.settings import NOT_NEGATIVE, Rule

__all__ = ["RAE", "RAESettings"]


@dataclass(frozen=True)
class RAESettings(ExPostSettings):
    """Regularised autoencoder; the density of its codes is a table of its own."""

    name: str = "rae"
    """Name of the model."""
    beta: float = 0.01
    """Weight of the codes' squared norm. With regularizer none and beta 0 the model is a plain autoencoder."""
    regularizer: Literal["l2", "gp", "sn", "none"] = "l2"
    """Regulariser of the decoder. l2: squared norm of its weights; gp: gradient penalty; sn: spectral normalisation."""
    strength: float = 1e-4
    """For regularizer l2 and gp: weight of the regulariser."""
    gradient_penalty: Literal["jacobian", "released"] = "jacobian"
    """For regularizer gp: what is penalised. jacobian: the decoder's squared Jacobian norm (the paper); released: the squared
    gradient of the squared output (the paper's released code)."""
    spectral_encoder: bool = False
    """For regularizer sn: normalise the encoder's layers, too, as the paper's released code does."""
    density: DensitySettings = DensitySettings(kind="mixture")  # noqa: RUF009 - frozen

    RULES: ClassVar[Mapping[str, Rule]] = {**ExPostSettings.RULES, "beta": NOT_NEGATIVE, "strength": NOT_NEGATIVE}

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with this regulariser and these networks, by name."""
        own = {"l2": ("strength",), "gp": ("strength", "gradient_penalty"), "sn": ("spectral_encoder",)}
        without = {"strength", "gradient_penalty", "spectral_encoder"}.difference(own.get(self.regularizer, ()))
        return {name: value for name, value in super().effective().items() if name not in without}

    def choice(self, name: str) -> str:
        """The field that decides whether the field `name` has an effect."""
        return "regularizer" if name in ("strength", "gradient_penalty", "spectral_encoder") else super().choice(name)

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions, regulariser {self.regularizer}, β = {self.beta:g}"


class RAE(ExPostModel):
    """Regularised autoencoder (Ghosh, Sajjadi, Vergari, Black, Schölkopf, arXiv:1903.12436).

    With encoder E, decoder D and codes z = E(x) the loss is, as a mean over the images x of a batch,

        ‖D(z) − x‖² + β·½‖z‖² + λ·R,

    where R is one of

        l2     ‖θ_D‖², over the weights of the decoder's layers, without biases and batch norms
        gp     ‖∂D(z)/∂z‖² (Frobenius), estimated as ‖∇_z Σ v·D(z)‖² with v ~ N(0, I) of an image's shape, whose mean it is
        sn     0; instead every layer of D has the spectral norm 1, see `spectral.spectral_norm`
        none   0; "RAE" in the paper's tables, and "AE" with β = 0

    After training, a density is fitted to the codes of the training set, from which samples draw their codes.

    The released code (github.com/ParthaEth/Regularized_autoencoders-RAE-) differs from the paper in its terms. It divides the
    error by the number P of pixel values, takes ‖z‖²/D instead of ½‖z‖², where D is the dimension of codes, and takes ‖∇_z Σ
    D(z)²‖²/D for gp; `gradient_penalty` released is this term without the division. Its loss, multiplied by P, is the one
    above with β = 2·β'·P/D, and λ = λ'·P for l2 or λ'·P/D for gp, where β' and λ' are its own weights. It leaves some dense
    layers out of l2.

    In training the gradients of gp go through the batch norms, as in the released code, so that they include how an image
    depends on the other codes of its batch.

    Args:
        shape: (C, H, W) of the images; sizes depend on the networks, see `LatentModel`.
        settings: see `RAESettings`; `beta` is β, `strength` is λ, `regularizer` chooses R.
    """

    Settings = RAESettings
    words = Words(
        "RAE",
        curves={"reconstruction": "squared error per image", "loss": "loss: error and regularisers, per image"},
    )
    settings: RAESettings

    def __init__(self, shape: Sequence[int], settings: RAESettings = RAESettings()) -> None:
        super().__init__(shape, settings)
        if settings.regularizer == "sn":
            spectral_norm(self.decoder)
            if settings.spectral_encoder:
                spectral_norm(self.encoder)

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch x (B, C, H, W) in [0, 1], means over the images.

        Args:
            generator: source of v for the gradient penalty, on x's device; the global one if None.

        Returns:
            loss: the loss to back-propagate.    reconstruction: ‖D(z) − x‖².    codes: ½‖z‖².
            penalty: R, with the regularisers l2 and gp.
        """
        settings, z = self.settings, self.encode(x)
        found: dict[str, Tensor] = {}
        if settings.regularizer == "gp":
            x_hat, found["penalty"] = decode_with_penalty(self.decode, z, generator, settings.gradient_penalty)
        else:
            x_hat = self.decode(z)
        if settings.regularizer == "l2":
            found["penalty"] = squared_weights(self.decoder)
        found["reconstruction"] = reconstruction_loss("mse", x_hat, x)
        found["codes"] = 0.5 * z.square().sum(1).mean()
        loss = found["reconstruction"] + settings.beta * found["codes"]
        if "penalty" in found:
            loss = loss + settings.strength * found["penalty"]
        return {"loss": loss, **found}
