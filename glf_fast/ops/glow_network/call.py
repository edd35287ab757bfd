"""The arguments of one call of Glow's networks as one value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Call"]


class Call(NamedTuple):
    """The arguments of `reference.glow_network`."""

    x: Tensor  # (B, C, H, W)
    first: Tensor  # (N, C + 1, 3, 3)
    first_log_scale: Tensor  # (N,)
    first_bias: Tensor  # (N,)
    second: Tensor  # (N, N, 1, 1)
    second_log_scale: Tensor  # (N,)
    second_bias: Tensor  # (N,)
    last: Tensor  # (O, N, 3, 3)
    edge: Tensor  # (O, 3, 3)
    bias: Tensor  # (O,)
    log_gain: Tensor  # (O,)
    gain_factor: float

    @staticmethod
    def of(tensors: Iterable[Tensor], gain_factor: float) -> Call:
        """The call of these tensors, in the order of the fields."""
        return Call._make([*tensors, gain_factor])
