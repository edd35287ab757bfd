"""Recognises a library's clamp among this project's log-scale functions, by its values.

What FrEIA's clamps compute has changed between releases without a trace in the state_dict, and may be a user's function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glf_fast.conversion.layers import Unfusable

__all__ = ["LogScale", "recognised"]


@dataclass(frozen=True)
class LogScale:
    """ℓ = f(factor·u) with our f by name and constant."""

    name: str
    constant: float | None
    factor: float


@torch.no_grad()
def recognised(f: Callable[[Tensor], Tensor]) -> LogScale:
    """ℓ = a·tanh(b·u), a·atan(b·u) or a·u, found by the value at infinity and at one, and checked between."""
    u = torch.tensor([-1e12, -20.0, -2.0, -0.3, -1e-3, 0.0, 1e-3, 0.1, 0.5, 1.0, 3.0, 7.0, 1e12], dtype=torch.float64)
    ell = f(u.clone())
    if not isinstance(ell, Tensor) or ell.shape != u.shape or not bool(torch.isfinite(ell).all()):
        raise Unfusable("its clamp_activation gives values that are not finite, or not one for each")
    top, one = float(ell[-1]), float(ell[9])

    def is_it(candidate: Tensor) -> bool:
        return bool(torch.allclose(ell, candidate, rtol=1e-9, atol=1e-12))

    if is_it(one * u):
        return LogScale("exp", None, _clean(one))
    if top > 0 and 0 < one < top:
        b = _clean(math.atanh(one / top))
        if is_it(top * torch.tanh(b * u)):
            return LogScale("tanh", _clean(top), _clean(b * top))  # s·tanh(factor·u/s) with factor = b·s
        amplitude = top / (math.pi / 2)
        b = _clean(math.tan(one / amplitude))
        if is_it(amplitude * torch.atan(b * u)):
            return LogScale("atan", _clean(amplitude / 0.636), b)
    raise Unfusable("its clamp_activation is none of those that are covered (tanh, atan, sigmoid, the identity)")


def _clean(value: float) -> float:
    """Without the rounding of the last digits of the way it was found."""
    return round(value, 10)
