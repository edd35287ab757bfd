"""Generative models of images, by name: networks, losses and sampling, built from `glf_fast.flow`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glf_fast.errors import UserError, did_you_mean
from glf_fast.models.glf import GLF
from glf_fast.models.model import GenerativeModel

__all__ = ["GLF", "GenerativeModel", "build", "names"]

_REGISTRY: dict[str, type[GenerativeModel]] = {"glf": GLF}


def names() -> tuple[str, ...]:
    """The models there are."""
    return tuple(_REGISTRY)


def build(name: str, config: Mapping[str, Any]) -> GenerativeModel:
    """The untrained model called `name` from its constructor's arguments.

    Raises:
        UserError: no such model, or a setting that it does not have or cannot take.
    """
    if name not in _REGISTRY:
        raise UserError(f"no model {name!r}; {did_you_mean(name, _REGISTRY)}there are {', '.join(_REGISTRY)}")
    return _REGISTRY[name].from_config(config)
