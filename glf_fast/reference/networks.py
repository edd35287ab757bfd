"""Kinds of network that make a coupling's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from glf_fast.reference.dropout import Dropout
from glf_fast.reference.mlp import mlp
from glf_fast.reference.residual import residual

__all__ = ["NETWORKS", "Network"]


class Network(Protocol):
    """A network of one step, with the parameters of its linear layers."""

    def __call__(
        self, h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], context: Tensor | None, activation: str,
        activation_constant: float | None, dropout: Dropout | None,
    ) -> Tensor:  # fmt: skip
        """h (B, P + C) → (B, n); its last columns are the context (B, C), which may be None."""
        ...


def _mlp(
    h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], context: Tensor | None, activation: str,
    activation_constant: float | None, dropout: Dropout | None,
) -> Tensor:  # fmt: skip
    return mlp(h, weights, biases, activation, activation_constant, dropout)


# A new kind of network is an entry here, a layout of its layers in ops/coupling_flow/networks.py, and a case in csrc/cpu.
NETWORKS: dict[str, Network] = {"mlp": _mlp, "residual": residual}
