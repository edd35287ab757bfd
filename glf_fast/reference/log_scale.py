"""Log-scale functions ℓ = f(u): how a coupling's raw network output u becomes the logarithm of its scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOG_SCALES", "LOG_SCALE_FUNCTIONS", "LogScale", "log_scale", "prepared_constant"]


class LogScale(NamedTuple):
    """A log-scale function and its one constant, if it has one."""

    function: Callable[[Tensor, float], Tensor]  # ℓ of u and of the prepared constant
    default: float | None = None
    interval: tuple[float, float] = (0.0, math.inf)  # the constant lies between these
    prepare: Callable[[float], float] = float  # the constant as the function takes it, here and in the kernels


# A new function is an entry here, one in csrc/cpu/flow.h, one in csrc/cpu/elementwise.h and one in kernels/math.py.
LOG_SCALE_FUNCTIONS: dict[str, LogScale] = {
    "tanh": LogScale(lambda u, s: s * torch.tanh(u / s), 2.0),
    "exp": LogScale(lambda u, _: u),
    "glow": LogScale(lambda u, s: F.logsigmoid(u + s), 2.0, (-math.inf, math.inf)),
    "nflows": LogScale(lambda u, s: torch.log(torch.sigmoid(u + 2) + s), 1e-3),
    "atan": LogScale(lambda u, s: (s * 0.636) * torch.atan(u), 2.0),
    "softclip": LogScale(lambda u, s: u / (1 + torch.abs(u / s)), 1e-3, (0.0, 1.0), math.log),
    "jet": LogScale(lambda u, _: math.log(2) + F.logsigmoid(u)),
    "softplus": LogScale(lambda u, s: torch.log(F.softplus(u) + s), 1e-3),
    "clamp": LogScale(lambda u, _: u + (u.clamp(-5, 3) - u).detach()),
    "bayesflow": LogScale(lambda u, _: torch.log(F.softplus(torch.asinh(u) + math.log(math.e - 1)))),
}
# name → default of its constant (None: it has none).
LOG_SCALES: dict[str, float | None] = {name: f.default for name, f in LOG_SCALE_FUNCTIONS.items()}


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
    | `softplus` | log(softplus(u) + ε) [ε = 1e-3] | autoregressive transforms of nflows 0.14, sbi       |
    | `clamp`    | min(max(u, −5), 3), slope 1     | pyro, whose gradient passes the bounds              |
    | `bayesflow`| log softplus(arsinh u + ln(e−1))| BayesFlow 2; 0 at 0, e^ℓ grows as ln u and falls as 1/u|
    """
    f = LOG_SCALE_FUNCTIONS[name]
    return f.function(u, prepared_constant(name, constant))


def prepared_constant(name: str, constant: float | None) -> float:
    """The constant as the function takes it: ln m for softclip, 0 where there is none. None is the default."""
    f = LOG_SCALE_FUNCTIONS[name]
    given = f.default if constant is None else constant
    return 0.0 if given is None else f.prepare(given)
