"""Monotonic rational-quadratic splines: Durkan et al., Neural Spline Flows, arXiv:1906.04032."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PARAMETRIZATIONS", "TAILS", "Parametrization", "PreparedSpline", "Spline", "spline"]


class Parametrization(NamedTuple):
    """How numbers that a network made become widths, heights and slopes; see `spline`."""

    soft_clip: bool  # zuko's soft-clipped exponentials instead of softplus
    identity_at_zero: bool  # parameters of 0 make the identity
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_derivative: float = 1e-3


PARAMETRIZATIONS: dict[str, Parametrization] = {
    "madnis": Parametrization(soft_clip=False, identity_at_zero=True),
    "nflows": Parametrization(soft_clip=False, identity_at_zero=False),
    "zuko": Parametrization(soft_clip=True, identity_at_zero=True, min_width=0.0, min_height=0.0),
}
# What the spline does at the ends of its box: name → slopes that a network makes for K bins, less K.
TAILS = {"linear": -1, "circular": 0, "none": 1}


class Spline(NamedTuple):
    """The kind of a rational-quadratic spline: all but the parameters of its bins. See `spline`."""

    bins: int = 8  # K
    low: float = -5.0  # the box is [low, high]²
    high: float = 5.0
    tails: str = "linear"  # a name in TAILS
    parametrization: str = "madnis"  # a name in PARAMETRIZATIONS, whose minima these replace:
    min_width: float | None = None  # of a bin, relative to the box
    min_height: float | None = None
    min_derivative: float | None = None
    scale: float = 1.0  # of the parameters of widths and heights

    @property
    def columns(self) -> int:
        """Parameters of one spline: K widths, K heights, and K − 1 (linear), K (circular) or K + 1 (none) slopes."""
        return 3 * self.bins + TAILS[self.tails]

    def prepared(self) -> PreparedSpline:
        """The constants of the formulas."""
        form = PARAMETRIZATIONS[self.parametrization]
        given = (self.min_width, self.min_height, self.min_derivative)
        defaults = (form.min_width, form.min_height, form.min_derivative)
        min_width, min_height, min_derivative = (
            default if least is None else least for least, default in zip(given, defaults, strict=True)
        )
        factor = 1 / (min_derivative + math.log(2)) if form.identity_at_zero else 1.0
        clip = math.log(min_derivative) if form.soft_clip else 0.0
        return PreparedSpline(
            self.bins, self.tails, form.soft_clip, self.low, self.high, min_width, min_height, min_derivative, factor,
            clip, self.scale,
        )  # fmt: skip


class PreparedSpline(NamedTuple):
    """The constants of a spline, as kernels take them."""

    bins: int
    tails: str
    soft_clip: bool
    low: float
    high: float
    min_width: float
    min_height: float
    min_derivative: float
    factor: float  # of min_derivative + softplus(c)
    clip: float  # ln of the least slope, where parameters are clipped softly
    scale: float

    def numbers(self) -> list[float]:
        """All of it as numbers, in this order: of the tails the slopes that are made for K bins, less K."""
        return [float(TAILS[self.tails]) if name == "tails" else float(value) for name, value in self._asdict().items()]


def spline(x: Tensor, parameters: Tensor, options: Spline, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """y(x), elementwise, and log y'(x); with `inverse` x(y) and its log-derivative. In float32 or better.

    A bin from the knot (X, Y) to the knot (X + w, Y + h), with slopes δ₀ and δ₁ there, s = h/w and ξ = (x − X)/w:

        y  = Y + h (s ξ² + δ₀ ξ(1−ξ)) / (s + (δ₀ + δ₁ − 2s) ξ(1−ξ))                                          (eq. 4)
        y' = s² (δ₁ ξ² + 2s ξ(1−ξ) + δ₀ (1−ξ)²) / (s + (δ₀ + δ₁ − 2s) ξ(1−ξ))²                              (eq. 5)

    `parameters` (…, n) with x's shape before n: K numbers a for widths, K numbers b for heights, then c for slopes. With the
    size S = high − low of the box, the minima m, and `scale` times a and b:

    | parametrization | widths                     | slopes                                | used by                       |
    |-----------------|----------------------------|---------------------------------------|-------------------------------|
    | "madnis"        | S (m + (1−Km) softmax(a))  | (m + softplus(c)) / (m + ln 2)        | MadNIS; ours: 0 is identity   |
    | "nflows"        | S (m + (1−Km) softmax(a))  | m + softplus(c)                       | nflows, sbi, normflows, dingo |
    | "zuko"          | S softmax(a / (1 + |2a/l|)) | e^(c / (1 + |c/l|)), l = ln m of slopes | zuko, lampe                 |

    | tails      | slopes                                   | outside the box                         |
    |------------|------------------------------------------|-----------------------------------------|
    | "linear"   | K − 1, and 1 at both ends                | the identity                            |
    | "circular" | K, the last knot's is the first one's    | the identity: an angle lies in the box  |
    | "none"     | K + 1                                    | the identity: the slope jumps there     |

    NaN stays NaN.
    """
    o = options.prepared()
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, parameters = x.to(dtype), parameters.to(dtype)
    K, size = o.bins, o.high - o.low

    def parts(raw: Tensor, least: float) -> Tensor:
        raw = raw * o.scale
        if o.soft_clip:
            raw = raw / (1 + torch.abs(2 * raw / o.clip))
        return size * (least + (1 - K * least) * torch.softmax(raw, -1))

    widths, heights = parts(parameters[..., :K], o.min_width), parts(parameters[..., K : 2 * K], o.min_height)
    c = parameters[..., 2 * K :]
    slopes = (
        torch.exp(c / (1 + torch.abs(c / o.clip))) if o.soft_clip else o.factor * (o.min_derivative + F.softplus(c))
    )
    if o.tails == "linear":
        slopes = F.pad(slopes, (1, 1), value=1.0)
    elif o.tails == "circular":
        slopes = torch.cat([slopes, slopes[..., :1]], -1)
    # Knots, without the last one, which nothing is compared with.
    X, Y = (o.low + F.pad(t[..., :-1].cumsum(-1), (1, 0)) for t in (widths, heights))

    inside = (x >= o.low) & (x <= o.high)
    at = torch.where(inside, x, o.low)  # outside, and for NaN, any place does
    k = (at[..., None] >= (Y if inverse else X)[..., 1:]).sum(-1, keepdim=True)
    X, w, Y, h, d0, d1 = (
        t.gather(-1, k + behind).squeeze(-1)
        for t, behind in ((X, 0), (widths, 0), (Y, 0), (heights, 0), (slopes, 0), (slopes, 1))
    )
    s = h / w
    bend = d0 + d1 - 2 * s
    if inverse:  # eqs. 6 to 8, and the root of eq. 29
        above = at - Y
        a2, a1, a0 = h * (s - d0) + above * bend, h * d0 - above * bend, -s * above
        discriminant = (a1 * a1 - 4 * a2 * a0).clamp_min(torch.finfo(dtype).tiny)
        xi = 2 * a0 / (-a1 - discriminant.sqrt())
    else:
        xi = (at - X) / w
    middle = xi * (1 - xi)
    denominator = s + bend * middle
    slope = s * s * (d1 * xi * xi + 2 * s * middle + d0 * (1 - xi) * (1 - xi)) / (denominator * denominator)
    log_slope = torch.log(slope)
    out = X + w * xi if inverse else Y + h * (s * xi * xi + d0 * middle) / denominator
    return torch.where(inside, out, x), torch.where(inside, -log_slope if inverse else log_slope, 0.0)
