"""Log-scale functions ℓ = f(u): how a coupling's raw network output u becomes the logarithm of its scale."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOG_SCALES", "log_scale"]

# name → default of its one constant (None: it has none).
LOG_SCALES: dict[str, float | None] = {
    "tanh": 2.0,
    "exp": None,
    "glow": 2.0,
    "nflows": 1e-3,
    "atan": 2.0,
    "softclip": 1e-3,
    "jet": None,
}


def log_scale(u: Tensor, name: str = "tanh", constant: float | None = None) -> Tensor:
    """ℓ = f(u), elementwise, in u's dtype; `constant` replaces the default given in brackets.

    | name       | ℓ = f(u)                        | used by                                             |
    |------------|---------------------------------|-----------------------------------------------------|
    | `tanh`     | s·tanh(u/s)           [s = 2]   | bounded and smooth; FrEIA's AllInOneBlock           |
    | `exp`      | u                               | RealNVP (arXiv:1605.08803), normflows; can overflow |
    | `glow`     | log σ(u + s)          [s = 2]   | Glow's released code (arXiv:1807.03039)             |
    | `nflows`   | log(σ(u + 2) + ε)     [ε = 1e-3]| nflows 0.14                                         |
    | `atan`     | s·0.636·atan(u)       [s = 2]   | FrEIA's coupling blocks, the GLF paper's code       |
    | `softclip` | u / (1 + |u / ln m|)  [m = 1e-3]| zuko                                                |
    | `jet`      | log 2σ(u)                       | Jet (arXiv:2412.15129)                              |
    """
    default = LOG_SCALES[name]
    s = default if constant is None else constant
    if name == "exp":
        return u
    if name == "jet":
        return math.log(2) + F.logsigmoid(u)
    assert s is not None
    if name == "tanh":
        return s * torch.tanh(u / s)
    if name == "glow":
        return F.logsigmoid(u + s)
    if name == "nflows":
        return torch.log(torch.sigmoid(u + 2) + s)
    if name == "atan":
        return (s * 0.636) * torch.atan(u)
    return u / (1 + torch.abs(u / math.log(s)))  # softclip
