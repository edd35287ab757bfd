"""The arguments of one affine coupling as one value."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from glf_fast.reference import prepared_constant

__all__ = ["AffineOptions", "Call"]


class AffineOptions(NamedTuple):
    """The formula of an affine coupling: its log-scale, its order and its direction."""

    log_scale: str
    log_scale_constant: float | None
    add_first: bool
    inverse: bool

    @property
    def constant(self) -> float:
        """The log-scale's constant as kernels take it."""
        return prepared_constant(self.log_scale, self.log_scale_constant)

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `reference.affine_coupling`."""
        return self._asdict()


class Call(NamedTuple):
    """`reference.affine_coupling` of v, u and t: floating-point tensors of one shape (B, …), u and t of any precision."""

    v: Tensor
    u: Tensor
    t: Tensor
    options: AffineOptions
