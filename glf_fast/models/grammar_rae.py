"""Regularised autoencoder of the sentences of a grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from glf_fast.models.density import DensitySettings
from glf_fast.models.model import Words
from glf_fast.models.regularizers import decode_with_penalty, squared_weights
from glf_fast.models.sequence import GrammarModel, GrammarSettings
from glf_fast.models.spectral import spectral_norm
from glf_fast.settings import NOT_NEGATIVE, Rule

__all__ = ["GrammarRAE", "GrammarRAESettings"]


@dataclass(frozen=True)
class GrammarRAESettings(GrammarSettings):
    """Regularised autoencoder of the sentences of a grammar; the density of its codes is a table of its own."""

    name: str = "grammar-rae"
    """Name of the model."""
    beta: float = 0.01
    """Weight of the codes' squared norm."""
    regularizer: Literal["l2", "gp", "sn", "none"] = "l2"
    """Regulariser of the decoder. l2: squared norm of its weights; gp: gradient penalty; sn: spectral normalisation."""
    strength: float = 1e-4
    """For regularizer l2 and gp: weight of the regulariser."""
    density: DensitySettings = DensitySettings(kind="mixture")  # noqa: RUF009 - frozen

    CHOICE: ClassVar[str] = "regularizer"
    RULES: ClassVar[Mapping[str, Rule]] = {**GrammarSettings.RULES, "beta": NOT_NEGATIVE, "strength": NOT_NEGATIVE}

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with this regulariser, by name."""
        without = ("strength",) if self.regularizer in ("sn", "none") else ()
        return {name: value for name, value in super().effective().items() if name not in without}

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{super().summary()}, regulariser {self.regularizer}, β = {self.beta:g}"


class GrammarRAE(GrammarModel):
    """GrammarRAE (Ghosh, Sajjadi, Vergari, Black, Schölkopf, arXiv:1903.12436, section 6.2).

    The encoder E and the decoder D of the Grammar VAE, trained as a regularised autoencoder: with the rules s of a derivation
    and the code z = E(s), the loss is, as a mean over the batch,

        −log p(s|z) + β·½‖z‖² + λ·R,

    where R is one of

        l2     ‖θ_D‖², over the weights of the decoder's dense layers, those of its recurrent layers among them
        gp     ‖∂D(z)/∂z‖² (Frobenius), of the scores D(z) of the rules, estimated as ‖∇_z Σ v·D(z)‖² with v ~ N(0, I)
        sn     0; instead every dense layer of D has the spectral norm 1, see `spectral.spectral_norm`
        none   0

    After training, a density is fitted to the codes of the training set, from which samples draw their codes. The paper's
    released code has no grammar, so β and λ are this project's own.

    Args:
        shape: (L,) of the sequences.
        settings: see `GrammarRAESettings`; `beta` is β, `strength` is λ, `regularizer` chooses R.
    """

    Settings = GrammarRAESettings
    words = Words(
        "GrammarRAE",
        interpolations="From one test sequence to another.",
        curves={"reconstruction": "−log-likelihood of rules", "loss": "loss: rules and regularisers, per sequence"},
    )
    settings: GrammarRAESettings

    def __init__(self, shape: Sequence[int], settings: GrammarRAESettings = GrammarRAESettings()) -> None:
        super().__init__(shape, settings)
        if settings.regularizer == "sn":
            spectral_norm(self.decoder)

    def losses(self, symbols: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch of derivations (B, rules), means over the batch.

        Args:
            generator: source of v for the gradient penalty, on the batch's device; the global one if None.

        Returns:
            loss: the loss to back-propagate.    reconstruction: −log p(s|z).    codes: ½‖z‖².
            penalty: R, with the regularisers l2 and gp.
        """
        settings, z = self.settings, self.encoder(symbols)
        found: dict[str, Tensor] = {}
        if settings.regularizer == "gp":
            scores, found["penalty"] = decode_with_penalty(self.decoder, z, generator, "jacobian")
        else:
            scores = self.decoder(z)
        if settings.regularizer == "l2":
            found["penalty"] = squared_weights(self.decoder)
        found["reconstruction"] = -self.log_likelihoods(scores, symbols).mean()
        found["codes"] = 0.5 * z.square().sum(1).mean()
        loss = found["reconstruction"] + settings.beta * found["codes"]
        if "penalty" in found:
            loss = loss + settings.strength * found["penalty"]
        return {"loss": loss, **found}
