"""Recognises a library's log-scale among this project's, by its values.

Those change between releases without a trace in the state_dict, and may be a user's function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from glf_fast.conversion.layers import EXP, Scale, Unfusable
from glf_fast.reference import log_scale

__all__ = ["fitted", "recognised"]


def recognised(candidates: Iterable[Scale], u: Tensor, ell: Tensor, otherwise: str) -> Scale:
    """The first of the candidates of which ell are the log-scales of u, in float64; raises Unfusable, with a reason."""
    for candidate in candidates:
        if _makes(candidate, u, ell):
            return candidate
    raise Unfusable(otherwise)


@torch.no_grad()
def fitted(f: Callable[[Tensor], Tensor]) -> tuple[Scale, float]:
    """ℓ = a·tanh(b·u), a·atan(b·u) or a·u of a function, as a log-scale and the factor of u in it.

    a and b are found by the value at infinity and at one, and checked between.
    """
    u = torch.tensor([-1e12, -20.0, -2.0, -0.3, -1e-3, 0.0, 1e-3, 0.1, 0.5, 1.0, 3.0, 7.0, 1e12], dtype=torch.float64)
    ell = f(u.clone())
    if not isinstance(ell, Tensor) or ell.shape != u.shape or not bool(torch.isfinite(ell).all()):
        raise Unfusable("its clamp_activation gives values that are not finite, or not one for each")
    top, one = float(ell[-1]), float(ell[9])
    candidates = [(EXP, one)]
    if top > 0 and 0 < one < top:
        amplitude = top / (math.pi / 2)
        candidates += [
            (Scale("tanh", top), math.atanh(one / top) * top),  # s·tanh(factor·u/s)
            (Scale("atan", amplitude / 0.636), math.tan(one / amplitude)),
        ]
    for scale, factor in candidates:
        if _makes(scale, factor * u, ell):
            return Scale(scale.log_scale, scale.constant and _clean(scale.constant)), _clean(factor)
    raise Unfusable("its clamp_activation is none of those that are covered (tanh, atan, sigmoid, the identity)")


def _makes(scale: Scale, u: Tensor, ell: Tensor) -> bool:
    return torch.allclose(ell, log_scale(u, scale.log_scale, scale.constant), rtol=1e-9, atol=1e-12)


def _clean(value: float) -> float:
    """Without the rounding of the last digits of the way it was found."""
    return round(value, 10)
