"""The arguments of one call of Glow's networks as one value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from glf_fast.ops.checks import check_floating, check_shape

__all__ = ["Call", "check"]


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


def check(call: Call, channels: int) -> None:
    """Raise ValueError or TypeError unless the network is one of images (B, …, H, W), of which it is given so many channels."""
    named = list(zip(Call._fields, call[:-1], strict=False))
    for name, tensor in named:
        check_floating(name, tensor)
    check_shape("x", call.x, (None, None, None, None), "(batch, channels, height, width)")
    hidden, outputs = call.first.shape[0], call.last.shape[0]
    check_shape("first", call.first, (hidden, channels + 1, 3, 3), "(N, channels + 1, 3, 3)")
    check_shape("second", call.second, (hidden, hidden, 1, 1), "(N, N, 1, 1)")
    check_shape("last", call.last, (outputs, hidden, 3, 3), "(outputs, N, 3, 3)")
    check_shape("edge", call.edge, (outputs, 3, 3), "(outputs, 3, 3)")
    for name, tensor in named:
        if name.startswith(("first_", "second_")):
            check_shape(name, tensor, (hidden,), "(N,)")
    check_shape("bias", call.bias, (outputs,), "(outputs,)")
    check_shape("log_gain", call.log_gain, (outputs,), "(outputs,)")
