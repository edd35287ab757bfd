"""The arguments of one call of splines as one value."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from glf_fast.reference import Spline

__all__ = ["Call"]


class Call(NamedTuple):
    """`reference.spline` of x, whose log-derivatives are summed over each row. All is contiguous and of one dtype."""

    x: Tensor  # (rows, columns)
    parameters: Tensor  # (rows, columns, options.columns)
    options: Spline
    inverse: bool
