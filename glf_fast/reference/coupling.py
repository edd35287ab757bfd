"""Kinds of coupling: what becomes of the transformed columns v, given what the step's networks make of the passive ones."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from glf_fast.reference.affine_coupling import affine_coupling
from glf_fast.reference.spline import Spline
from glf_fast.reference.spline import spline as rational_quadratic

__all__ = ["COUPLINGS", "Coupling"]


class Transform(Protocol):
    """(v (B, T), raw (B, n·T)) → w (B, T) and log|det ∂w/∂v| (B,); with `inverse` back. `options` are the flow's."""

    def __call__(
        self, v: Tensor, raw: Tensor, *, inverse: bool, spline: Spline | None, **options: Any
    ) -> tuple[Tensor, Tensor]: ...


class Coupling(NamedTuple):
    """A transform of single numbers, and the networks that make its parameters."""

    transform: Transform
    columns: int  # that a network makes for each column of v; 0: as many as its kind of spline has
    networks: int = 1  # of a step, which side by side make `raw`


def _affine(v: Tensor, raw: Tensor, *, inverse: bool, spline: Spline | None, **options: Any) -> tuple[Tensor, Tensor]:
    u, t = raw.chunk(2, 1)
    return affine_coupling(v, u, t, inverse=inverse, **options)


def _additive(v: Tensor, raw: Tensor, *, inverse: bool, **options: Any) -> tuple[Tensor, Tensor]:
    return v - raw if inverse else v + raw, v.new_zeros(len(v))


def _spline(v: Tensor, raw: Tensor, *, inverse: bool, spline: Spline | None, **options: Any) -> tuple[Tensor, Tensor]:
    spline = spline or Spline()
    w, log_slope = rational_quadratic(v, raw.unflatten(1, (v.shape[1], spline.columns)), spline, inverse=inverse)
    return w, log_slope.sum(1)


# A new kind of coupling is an entry here, one in csrc/cpu/coupling.h, and a case in kernels/coupling_flow.py or, for the Triton
# kernels, a line in ops/coupling_flow/networks.py that turns it into one that they know.
COUPLINGS: dict[str, Coupling] = {
    "affine": Coupling(_affine, columns=2),  # v·e^f(u) + t, with [u, t] from one network: RealNVP (arXiv:1605.08803)
    "separate": Coupling(_affine, columns=1, networks=2),  # the same with one network for u and one for t
    "additive": Coupling(_additive, columns=1),  # v + t: NICE (arXiv:1410.8516)
    "spline": Coupling(_spline, columns=0),  # a rational-quadratic spline for each v: arXiv:1906.04032
}
