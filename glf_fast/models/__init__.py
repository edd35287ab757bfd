"""Generative models by name. A model is one file; `model` describes what the file must contain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glf_fast.errors import UserError, did_you_mean
from glf_fast.models.alpha_gan import AlphaGAN
from glf_fast.models.character_vae import CharacterVAE
from glf_fast.models.dcgan import DCGAN
from glf_fast.models.flow_vae import FlowVAE
from glf_fast.models.glann import GLANN
from glf_fast.models.glf import GLF
from glf_fast.models.glow import Glow
from glf_fast.models.grammar_rae import GrammarRAE
from glf_fast.models.grammar_vae import GrammarVAE
from glf_fast.models.model import (
    Decodes,
    DrawsCodes,
    Encodes,
    GenerativeModel,
    HasLikelihood,
    Interpolates,
    ModelSettings,
    Phase,
    Reconstructs,
    SamplesClasses,
    ScoresCodes,
    Stage,
    Words,
    Writes,
)
from glf_fast.models.rae import RAE
from glf_fast.models.two_stage_vae import TwoStageVAE
from glf_fast.models.vae import VAE
from glf_fast.models.wae import WAE
from glf_fast.models.wae_gan import WAEGAN
from glf_fast.models.wgan_gp import WGANGP

__all__ = [
    "GLF",
    "RAE",
    "VAE",
    "Decodes",
    "DrawsCodes",
    "Encodes",
    "GenerativeModel",
    "HasLikelihood",
    "Interpolates",
    "ModelSettings",
    "Phase",
    "Reconstructs",
    "SamplesClasses",
    "ScoresCodes",
    "Stage",
    "Words",
    "Writes",
    "build",
    "kind",
    "names",
]

# The registry; the first model is the default.
_MODELS: dict[str, type[GenerativeModel]] = {
    "glf": GLF,
    "vae": VAE,
    "rae": RAE,
    "wae-mmd": WAE,
    "glann": GLANN,
    "flow-vae": FlowVAE,
    "two-stage-vae": TwoStageVAE,
    "glow": Glow,
    "wae-gan": WAEGAN,
    "alpha-gan": AlphaGAN,
    "dcgan": DCGAN,
    "wgan-gp": WGANGP,
    "grammar-rae": GrammarRAE,
    "grammar-vae": GrammarVAE,
    "character-vae": CharacterVAE,
}


def names() -> tuple[str, ...]:
    """Names of the models."""
    return tuple(_MODELS)


def kind(name: str) -> type[GenerativeModel]:
    """The class of the model called `name`; raises UserError, with the nearest name, if it does not exist."""
    if name not in _MODELS:
        raise UserError(f"no model {name!r}; {did_you_mean(name, _MODELS)}the models are {', '.join(_MODELS)}")
    return _MODELS[name]


def build(name: str, config: Mapping[str, Any]) -> GenerativeModel:
    """The untrained model called `name` from its `config`.

    Raises:
        UserError: an unknown model, or a setting that the model does not have or cannot take.
    """
    return kind(name).from_config(config)
