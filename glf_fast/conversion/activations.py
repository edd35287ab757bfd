"""Activations of other libraries' networks, by name and constant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from glf_fast.conversion.layers import NamedActivation, Unfusable
from glf_fast.reference import ACTIVATION_FUNCTIONS

__all__ = ["activation_of_call", "activation_of_module", "named_activation", "one_activation"]

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.Hardswish: "hardswish",
    nn.Softplus: "softplus",
    nn.Mish: "mish",
}
_FUNCTIONS: dict[Callable[..., Any], str] = {
    **{getattr(F, name): name for name in _MODULES.values()},
    torch.relu: "relu",
    torch.tanh: "tanh",
}
# What these modules and functions are given besides their input, in order, before `inplace`, which changes nothing.
_CONSTANTS = {
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "gelu": ("approximate",),
    "softplus": ("beta", "threshold"),
}


def one_activation(name: str, activations: Sequence[NamedActivation]) -> NamedActivation:
    """The activation that all of these are, of the network of that name; ReLU where there is none.

    Raises Unfusable for several.
    """
    kinds = dict.fromkeys(activations)
    if len(kinds) > 1:
        shown = sorted(kind.name + (f" ({kind.constant:g})" if kind.constant is not None else "") for kind in kinds)
        raise Unfusable(f"{name} has different activations: {', '.join(shown)}")
    return next(iter(kinds), NamedActivation("relu"))


def activation_of_module(module: nn.Module) -> NamedActivation | None:
    """The activation that a module is; None if it is not one. Raises Unfusable for one with constants that are not covered."""
    name = _MODULES.get(type(module))
    if name is None:
        return None
    return _with_constants(name, {key: getattr(module, key) for key in _CONSTANTS.get(name, ())})


def _with_constants(name: str, given: Mapping[str, Any]) -> NamedActivation:
    """The activation with the constants that PyTorch's has been given, by their names there; raises Unfusable."""
    if given.get("approximate", "none") != "none":
        raise Unfusable("GELU by tanh; the exact one is covered")
    beta, threshold = given.get("beta", 1), given.get("threshold", 20)
    if (beta, threshold) != (1, 20):
        raise Unfusable(f"Softplus with beta {beta} and threshold {threshold}; 1 and 20 are covered")
    f = ACTIVATION_FUNCTIONS[name]
    constant = given.get("negative_slope", given.get("alpha", f.default))
    if constant is None:
        return NamedActivation(name)
    if name == "leaky_relu" and constant == 0:
        return NamedActivation("relu")
    low, high = f.interval
    if not isinstance(constant, int | float) or not low < constant < high:
        raise Unfusable(f"{name} with {_CONSTANTS[name][0]} {constant}; finite numbers above {low:g} are covered")
    return NamedActivation(name, float(constant))


def activation_of_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> NamedActivation:
    """The activation that a function is on its first argument, given these others; raises Unfusable."""
    name = _FUNCTIONS.get(function)
    if name is None:
        raise Unfusable(f"the activation {getattr(function, '__name__', function)!r} is not covered")
    return _with_constants(name, dict(zip((*_CONSTANTS.get(name, ()), "inplace"), args, strict=False)) | dict(kwargs))


def named_activation(activation: Any) -> NamedActivation:
    """The activation that a module or a function is; raises Unfusable."""
    if isinstance(activation, nn.Module):
        if (found := activation_of_module(activation)) is None:
            raise Unfusable(f"the activation {activation!r} is not covered")
        return found
    if isinstance(activation, partial) and not activation.args:
        return activation_of_call(activation.func, (), activation.keywords)
    return activation_of_call(activation, (), {})
