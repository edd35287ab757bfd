"""Elementwise mathematics of the kernels: activations, log-scales and their derivatives.

Written with `tl.exp`, `tl.log`, `tl.sqrt` and `tl.erf` alone: the interpreter has no libdevice. Every function takes float32 or
float64 and computes in it; names and constants are compile-time constants, so that each kernel holds the one formula it needs.
NaN stays NaN throughout, as in PyTorch.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + e^−x)"""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """(1 − e^−2|x|) / (1 + e^−2|x|), with the sign of x: exponents never overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def log_sigmoid(x):
    """min(x, 0) − log(1 + e^−|x|), by Kahan's log1p: what 1 + e rounds away is put back by e / ((1 + e) − 1)."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - log1p


@triton.jit
def atan(x):
    """arctan: |x| > 1 goes by its reciprocal, then two halvings of the angle leave |y| < 0.2 for the series.

    Its terms end below an ulp: 0.2¹³/13 ≈ 6e-11 in float32, 0.2²³/23 ≈ 4e-18 in float64.
    """
    a = tl.abs(x)
    y = tl.where(a > 1.0, 1.0 / tl.where(a > 1.0, a, 1.0), a)
    y = y / (1.0 + tl.sqrt(1.0 + y * y))
    y = y / (1.0 + tl.sqrt(1.0 + y * y))
    TERMS: tl.constexpr = 11 if x.dtype == tl.float64 else 6
    square = y * y
    one = y * 0.0 + 1.0  # in y's precision: the interpreter would divide plain numbers in float32
    series = y * 0.0
    for i in tl.static_range(TERMS):
        series = one / (2 * (TERMS - 1 - i) + 1) - square * series
    angle = 4.0 * y * series
    angle = tl.where(a > 1.0, 1.5707963267948966 - angle, angle)
    return tl.where(x < 0, -angle, angle)


@triton.jit
def softplus(x):
    """log(1 + e^x), or x above 20, as in PyTorch."""
    return tl.where(x > 20.0, x, -log_sigmoid(-x))


@triton.jit
def one_minus_exp(x):
    """1 − e^−x of x ≥ 0. Its digits near 0 come from the series, whose terms end below an ulp at ¼."""
    TERMS: tl.constexpr = 12 if x.dtype == tl.float64 else 6
    one = x * 0.0 + 1.0  # in x's precision: the interpreter would divide plain numbers in float32
    series = one
    for i in tl.static_range(TERMS - 1):
        series = one - series * x * (one / (TERMS - i))
    return tl.where(x < 0.25, x * series, 1.0 - tl.exp(-x))


@triton.jit
def mish_parts(x):
    """n and q with tanh(softplus(x)) = n/q, in terms of t = e^−|x|, where nothing overflows or cancels; and t."""
    t = tl.exp(-tl.abs(x))
    n = 2.0 * t + tl.where(x > 0, 1.0, t * t)
    return n, n + 2.0 * tl.where(x > 0, t * t, 1.0), t


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of the hidden layers, as `glf_fast.reference.mlp.ACTIVATION_FUNCTIONS`: ACTIVATION is (name, constant)."""
    NAME: tl.constexpr = ACTIVATION[0]
    CONSTANT: tl.constexpr = ACTIVATION[1]
    if NAME == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "leaky_relu":
        return tl.where(x > 0, x, CONSTANT * x)
    elif NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif NAME == "tanh":
        return tanh(x)
    elif NAME == "elu":
        return tl.where(x > 0, x, CONSTANT * (tl.exp(x) - 1.0))
    elif NAME == "hardswish":
        y = tl.where(x < -3.0, 0.0, x + 3.0)
        return x * (tl.where(y > 6.0, 6.0, y) / 6.0)
    elif NAME == "softplus":
        return softplus(x)
    elif NAME == "mish":
        n, q, _ = mish_parts(x)
        return x * (n / q)
    else:  # λ x, or λα (e^x − 1) below 0
        tl.static_assert(NAME == "selu")
        return tl.where(x > 0, 1.0507009873554805 * x, 1.7580993408473766 * (tl.exp(x) - 1.0))


@triton.constexpr_function
def needs_input(activation):
    """Whether a'(x) is no function of a(x): the backward keeps it beside a(x)."""
    return activation[0] in ("silu", "gelu", "hardswish", "mish")


@triton.jit
def slope_from_input(x, ACTIVATION: tl.constexpr):
    """a'(x) of the activations that need their input."""
    NAME: tl.constexpr = ACTIVATION[0]
    if NAME == "silu":
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif NAME == "hardswish":
        return tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, x / 3.0 + 0.5))
    elif NAME == "mish":
        n, q, t = mish_parts(x)
        return n / q + x * (4.0 * t * (1.0 + t) * tl.where(x > 0, t, 1.0) / (q * q))
    else:
        tl.static_assert(NAME == "gelu")
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + x * density


@triton.jit
def times_slope_from_output(grad, h, ACTIVATION: tl.constexpr):
    """∂x = ∂h·a'(x) of the other activations, from h = a(x)."""
    NAME: tl.constexpr = ACTIVATION[0]
    CONSTANT: tl.constexpr = ACTIVATION[1]
    if NAME == "relu":
        return tl.where(h <= 0, 0.0, grad)
    elif NAME == "leaky_relu":
        return tl.where(h > 0, grad, CONSTANT * grad)
    elif NAME == "tanh":
        return grad * (1.0 - h * h)
    elif NAME == "elu":
        return tl.where(h > 0, grad, grad * (h + CONSTANT))
    elif NAME == "softplus":
        return tl.where(h > 20.0, grad, grad * one_minus_exp(h))
    else:
        tl.static_assert(NAME == "selu")
        return grad * tl.where(h > 0, 1.0507009873554805, h + 1.7580993408473766)


@triton.jit
def bayesflow(u):
    """q = (e − 1)·e^arsinh u, √(1 + u²) and the scale softplus(arsinh u + ln(e − 1)) = log(1 + q), by Kahan's log1p."""
    a = tl.abs(u)
    small = tl.where(a > 1e9, 1.0, a)  # its square cannot overflow
    root = tl.where(a > 1e9, a, tl.sqrt(1.0 + small * small))
    q = 1.7182818284590452 * tl.where(u < 0, 1.0 / (a + root), a + root)
    w = 1.0 + q
    known = (w != 1.0) & (w - 1.0 < float("inf"))
    return q, root, tl.where(known, tl.log(w) * (q / tl.where(known, w - 1.0, 1.0)), q)


@triton.jit
def log_scale(u, LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr):
    """ℓ = f(u), as `glf_fast.reference.log_scale`; CONSTANT is s or ε there, and ln m for softclip."""
    if LOG_SCALE == "tanh":
        return CONSTANT * tanh(u / CONSTANT)
    elif LOG_SCALE == "exp":
        return u
    elif LOG_SCALE == "glow":
        return log_sigmoid(u + CONSTANT)
    elif LOG_SCALE == "nflows":
        return tl.log(sigmoid(u + 2.0) + CONSTANT)
    elif LOG_SCALE == "atan":
        return (CONSTANT * 0.636) * atan(u)
    elif LOG_SCALE == "softclip":
        return u / (1.0 + tl.abs(u / CONSTANT))
    elif LOG_SCALE == "jet":
        return 0.6931471805599453 + log_sigmoid(u)
    elif LOG_SCALE == "clamp":
        return tl.where(u < -5.0, -5.0, tl.where(u > 3.0, 3.0, u)) + (u - u)  # NaN where u is infinite, as in pyro
    elif LOG_SCALE == "bayesflow":
        _, _, scale = bayesflow(u)
        return tl.log(scale)
    else:
        tl.static_assert(LOG_SCALE == "softplus")
        return tl.log(CONSTANT - log_sigmoid(-u))


@triton.jit
def log_scale_slope(u, LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr):
    """f'(u)."""
    if LOG_SCALE == "tanh":
        ratio = tanh(u / CONSTANT)
        return 1.0 - ratio * ratio
    elif LOG_SCALE == "exp" or LOG_SCALE == "clamp":  # of clamp the gradient passes the bounds
        return u * 0.0 + 1.0
    elif LOG_SCALE == "glow":
        return sigmoid(-(u + CONSTANT))
    elif LOG_SCALE == "nflows":
        s = sigmoid(u + 2.0)
        return s * (1.0 - s) / (s + CONSTANT)
    elif LOG_SCALE == "atan":
        return (CONSTANT * 0.636) / (1.0 + u * u)
    elif LOG_SCALE == "softclip":
        d = 1.0 + tl.abs(u / CONSTANT)
        return 1.0 / (d * d)
    elif LOG_SCALE == "jet":
        return sigmoid(-u)
    elif LOG_SCALE == "bayesflow":
        q, root, scale = bayesflow(u)
        return 1.0 / ((1.0 + 1.0 / q) * root * scale)
    else:
        tl.static_assert(LOG_SCALE == "softplus")
        return sigmoid(u) / (CONSTANT - log_sigmoid(-u))
