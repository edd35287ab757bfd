"""The arguments of one masked autoregressive flow as one value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from glf_fast.reference import Spline

__all__ = ["Call", "CallOptions"]


class CallOptions(NamedTuple):
    """The options of a flow, by the names that `glf_fast.reference` uses."""

    transform: str
    network: str
    activation: str
    activation_constant: float  # 0 where it has none
    log_scale: str
    log_scale_constant: float | None
    spline: Spline | None  # of a transform "spline" alone
    context_layer: bool
    inverse: bool
    density: bool  # log N(out; 0, I) and the maps' log-determinants are added to the steps'
    constant: float  # the log-scale's, as kernels take it
    autocast: str = ""  # of the networks' products: "bf16" or "fp16" under torch.autocast

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the reference's flows, whose direction is in their name."""
        return dict(zip(self._fields[:8], self, strict=False))


class Call(NamedTuple):
    """One call of a masked autoregressive flow."""

    x: Tensor  # data, or for the inverse noise (B, D)
    context: Tensor | None  # (B, C)
    matrix: Tensor  # A, or for the inverse A⁻¹ (K, D, D)
    offset: Tensor  # c (K, D)
    logabsdet: Tensor | None  # for a density: Σ log|det A| ()
    fan_in: Tensor  # (K, H₁ + … + D), int64
    weights: Sequence[Tensor]  # by linear layer of the networks: (K, rows, columns)
    biases: Sequence[Tensor]  # (K, columns)
    options: CallOptions
