"""Grammar VAE: a variational autoencoder of derivations of a grammar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from glf_fast.models.model import Words
from glf_fast.models.sequence import GrammarModel, GrammarSettings, SequenceVAE, SequenceVAESettings
from glf_fast.settings import Rule

__all__ = ["GrammarVAE", "GrammarVAESettings"]


@dataclass(frozen=True)
class GrammarVAESettings(GrammarSettings, SequenceVAESettings):
    """Grammar VAE."""

    name: str = "grammar-vae"
    """Name of the model."""

    RULES: ClassVar[Mapping[str, Rule]] = {**GrammarSettings.RULES, **SequenceVAESettings.RULES}


class GrammarVAE(GrammarModel, SequenceVAE):
    """Grammar VAE (Kusner, Paige, Hernández-Lobato, arXiv:1703.01925), see `SequenceVAE` for the loss of the rules.

    Samples decode codes of the prior; a density can be fitted to the mean codes instead.

    Args:
        shape: (L,) of the sequences.    settings: see `GrammarVAESettings`.
    """

    Settings = GrammarVAESettings
    words = Words(
        "Grammar VAE",
        interpolations="From one test sequence to another.",
        curves={"reconstruction": "−log-likelihood of rules", "loss": "β·KL − log-likelihood, in nats per sequence"},
    )
    settings: GrammarVAESettings
