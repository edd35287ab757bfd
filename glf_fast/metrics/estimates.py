"""Estimates with 95 % intervals by the delete-a-group jackknife."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GROUPS", "Estimate", "TooFew", "group_counts", "jackknife"]

# Two-sided 95 % quantile of Student's t with GROUPS − 1 = 19 degrees of freedom.
GROUPS = 20
T_QUANTILE = 2.0930240544


class TooFew(ValueError):
    """A score needs more images than there are."""


class Estimate(NamedTuple):
    """A value with its 95 % interval; None where there are too few samples for an interval."""

    value: float
    interval: tuple[float, float] | None


def jackknife(value: float, without: Tensor, low: float = -math.inf, high: float = math.inf) -> Estimate:
    """The interval of a statistic of samples, over other draws of equally many samples.

    Delete-a-group jackknife (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 11) over 20 groups, of
    every 20th sample each: value ± t₁₉·√(19/20·Σ(vᵢ−v̄)²), cut to [low, high].

    Args:
        without: the statistic (20,) without each group in turn.
    """
    spread = without.double()
    error = T_QUANTILE * float(((GROUPS - 1) / GROUPS * (spread - spread.mean()).square().sum()).sqrt())
    if not math.isfinite(error):
        return Estimate(value, None)
    return Estimate(value, (max(low, value - error), min(high, value + error)))


def group_counts(labels: Tensor, kinds: int) -> Tensor:
    """How often each of the labels 0 … kinds − 1 is in each group of `labels` (N,): float64 (20, kinds)."""
    groups = torch.arange(len(labels), device=labels.device) % GROUPS
    return torch.bincount(groups * kinds + labels, minlength=GROUPS * kinds).view(GROUPS, kinds).double()
