"""Columns of a table as a flow takes them: unbounded, of mean 0 and standard deviation 1, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from glf_fast.settings import NOT_NEGATIVE, POSITIVE, Rule, Settings

__all__ = ["Column", "decoded", "encoded", "far"]

# A flow computes in float32, in which the square of a larger number is infinite.
_LARGEST = 1e15


@dataclass(frozen=True)
class Column(Settings):
    """One column x, and the map z = (y(x) − mean) / std, where y maps the numbers between its bounds to all numbers.

    y is log((x − low) / (high − x)), log(x − low), −log(high − x) or x, by the bounds that are given.
    """

    name: str = ""
    """Name of the column in its table."""
    mean: float = 0.0
    """Mean of y."""
    std: float = 1.0
    """Standard deviation of y."""
    low: float | None = None
    """Lower bound of x, which x itself never has."""
    high: float | None = None
    """Upper bound of x, which x itself never has."""
    step: float = 0.0
    """Distance of the values of a discrete column, to which noise of this width was added; 0 for a continuous one."""
    origin: float = 0.0
    """One of the values of a discrete column."""

    RULES: ClassVar[Mapping[str, Rule]] = {"std": POSITIVE, "step": NOT_NEGATIVE}

    def mistake(self) -> str:
        """A message if the bounds are no bounds."""
        return (
            "low must be below high" if self.low is not None and self.high is not None and self.low >= self.high else ""
        )

    def inside(self, x: np.ndarray) -> np.ndarray:
        """Whether values (N,) are between the bounds."""
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        return (low < x) & (x < high)

    def unbounded(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """y and log dy/dx, both (N,), of values between the bounds."""
        if self.low is None and self.high is None:
            return x, np.zeros(len(x))
        y, slope = np.zeros(len(x)), np.zeros(len(x))
        if self.low is not None:
            above = np.log(x - self.low)
            y, slope = y + above, slope - above
        if self.high is not None:
            below = np.log(self.high - x)
            y, slope = y - below, slope - below
        if self.low is not None and self.high is not None:
            slope = slope + math.log(self.high - self.low)
        return y, slope

    def bounded(self, y: np.ndarray) -> np.ndarray:
        """The values x (N,) between the bounds that have these y."""
        if self.low is None and self.high is None:
            return y
        with np.errstate(over="ignore"):  # e^−y = ∞ gives the bound itself
            if self.high is None:
                return self.low + np.exp(y)
            if self.low is None:
                return self.high - np.exp(-y)
            return self.low + (self.high - self.low) / (1 + np.exp(-y))

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """The nearest values between the bounds that a discrete column has; those of a continuous one as they are."""
        if not self.step:
            return x
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        # A bound may be one of the values but for rounding, 0.1 + 2 · 0.1 for 0.3: a millionth of a step is none.
        least = np.floor((low - self.origin) / self.step + 1e-6) + 1
        most = np.ceil((high - self.origin) / self.step - 1e-6) - 1
        return self.origin + self.step * np.clip(np.round((x - self.origin) / self.step), least, most)


def far(column: Column, x: np.ndarray) -> np.ndarray:
    """Whether values (N,) between the bounds are too far from the column's mean for float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return ~(np.abs(column.unbounded(x)[0] / column.std - column.mean / column.std) <= _LARGEST)


def encoded(columns: Sequence[Column], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z (N, D) in float32 for a flow, and Σ log|dz/dx| (N,) in float64, of values (N, D).

    Rows that have no density, because a value is on or beyond a bound or too far away for float32, have z = 0 and −∞.
    """
    z, logdet = np.zeros(values.shape), np.zeros(len(values))
    for i, column in enumerate(columns):
        inside = column.inside(values[:, i])
        y, slope = column.unbounded(values[inside, i])
        with np.errstate(over="ignore"):
            z[inside, i] = y / column.std - column.mean / column.std
        logdet[inside] += slope - math.log(column.std)
        logdet[~inside] = -math.inf
    z[lost := ~np.isfinite(logdet) | (np.abs(z) > _LARGEST).any(1)] = 0.0
    logdet[lost] = -math.inf
    return z.astype(np.float32), logdet


def decoded(columns: Sequence[Column], z: np.ndarray) -> np.ndarray:
    """The values (N, D) in float64 of z (N, D). Those of discrete columns are not rounded."""
    z = z.astype(np.float64)
    return np.stack([c.bounded(z[:, i] * c.std + c.mean) for i, c in enumerate(columns)], 1)
