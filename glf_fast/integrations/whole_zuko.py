"""Whole flows of zuko as one flow of glf_fast each, for samplers that keep a flow of zuko. Needs zuko."""

from __future__ import annotations

import copy
import math
from numbers import Integral
from typing import Any

import torch
import zuko
from torch import nn

from glf_fast.conversion import ConversionError
from glf_fast.conversion.accelerate import accelerate
from glf_fast.conversion.zuko import ZukoLayer
from glf_fast.flow import CouplingFlow, Flow, InvertibleLinear, SequentialFlow

__all__ = ["batch_size_of", "coupling_flow", "integer", "stacked", "whole"]


def whole(flow: nn.Module) -> Flow:
    """Replace all transforms of an unconditional flow of zuko in place, and return the one flow that it now consists of.

    A flow that is refused stays as it was.

    Raises:
        TypeError: not a flow of zuko.
        ConversionError: a flow with a transform that is not replaced, with the reason, or with another base than N(0, I).
    """
    if not isinstance(flow, zuko.flows.Flow):
        raise TypeError(f"flow must be a zuko.flows.Flow; got {type(flow).__name__}")
    transform = flow.transform
    layers = _layers(flow)
    report = None
    if len(layers) != 1 or not isinstance(layers[0], ZukoLayer):
        replaced = copy.deepcopy(flow)
        report = accelerate(replaced)
        transform, layers = replaced.transform, _layers(replaced)
    if len(layers) != 1 or not isinstance(layers[0], ZukoLayer):
        raise ConversionError(f"not all of this {type(flow).__name__} can be replaced.\n{report}")
    base = flow.base()
    if not isinstance(base, zuko.distributions.DiagNormal) or base.mean.any() or (base.stddev != 1).any():
        raise ConversionError(f"the base of a flow must be N(0, I); that of this {type(flow).__name__} is {base}")
    flow.transform = transform
    return layers[0].flow


def _layers(flow: Any) -> list[nn.Module]:
    return list(getattr(flow.transform, "transforms", [flow.transform]))


def stacked(flow: Flow) -> Flow:
    """The flow without permutations at its end, which change nothing about N(0, I), so that `glf_fast.fit` runs in C++."""
    layers = list(flow.layers) if isinstance(flow, SequentialFlow) else [flow]
    while len(layers) > 1 and isinstance(layers[-1], InvertibleLinear) and layers[-1].linear == "permutation":
        layers.pop()
    return layers[0] if len(layers) == 1 and isinstance(layers[0], Flow) else flow


def batch_size_of(rows: int, most: int) -> int:
    """The size of equal batches, as many as batches of at most `most` would be: `glf_fast.fit` leaves out what fills none."""
    return max(1, rows // max(1, math.ceil(rows / max(1, most))))


def integer(value: Any) -> Any:
    """An integer of numpy as one of Python, as `glf_fast.fit` takes them; any other value as it is."""
    return int(value) if isinstance(value, Integral) else value


def coupling_flow(features: int, context: int = 0, **options: Any) -> nn.Module:
    """A `CouplingFlow` as a flow of zuko.

    Args:
        features, context: dimensions, and columns of a context, as zuko's flows take them.
        **options: further arguments of `glf_fast.CouplingFlow`.
    """
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
    )
    return zuko.flows.Flow([ZukoLayer(CouplingFlow(features, context_dim=context, **options))], base)
