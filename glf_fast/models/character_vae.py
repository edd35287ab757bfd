"""Character VAE: a variational autoencoder of token sequences that knows no grammar."""

from __future__ import annotations

from dataclasses import dataclass

from glf_fast.models.model import Words
from glf_fast.models.sequence import SequenceVAE, SequenceVAESettings

__all__ = ["CharacterVAE", "CharacterVAESettings"]


@dataclass(frozen=True)
class CharacterVAESettings(SequenceVAESettings):
    """Character VAE."""

    name: str = "character-vae"
    """Name of the model."""


class CharacterVAE(SequenceVAE):
    """Character VAE (Gómez-Bombarelli et al., arXiv:1610.02415) with the networks of the Grammar VAE, as in arXiv:1703.01925.

    See `SequenceVAE` for the loss; its symbols are the tokens. What it decodes need not be a sentence of any grammar.

    Args:
        shape: (L,) of the sequences.    settings: see `CharacterVAESettings`.
    """

    Settings = CharacterVAESettings
    words = Words(
        "Character VAE",
        interpolations="From one test sequence to another.",
        curves={"reconstruction": "−log-likelihood of tokens", "loss": "β·KL − log-likelihood, in nats per sequence"},
    )
    settings: CharacterVAESettings
