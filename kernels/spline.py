"""Rational-quadratic splines in one launch each way: softmax, running sums, search, spline, log-derivative and its sum.

`glf_fast.reference.spline` specifies the function. An element is one number x with N parameters: K of widths, K of heights, then
those of slopes, which are loaded as three tiles [elements, power of two] whose columns are bins, or slopes. A value of the
element's own bin is the sum of a tile in which a mask leaves one column: no thread holds an array, and nothing is searched step
by step. The backward computes all of it again from x and the parameters.

`spline` and `spline_backward` know nothing of memory: any kernel that has the three tiles in registers can call them. SPLINE is
the tuple of `PreparedSpline.numbers()`, of which BINS … SCALE are the places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.launch import launch
from glf_fast.kernels.math import log_sigmoid, sigmoid

__all__ = ["backward_kernel", "forward_kernel", "spline", "spline_backward", "splines_backward", "splines_forward"]

BINS, TAILS, SOFT_CLIP, LOW, HIGH = (tl.constexpr(i) for i in range(5))
MIN_WIDTH, MIN_HEIGHT, MIN_DERIVATIVE, FACTOR, CLIP, SCALE = (tl.constexpr(i) for i in range(5, 11))
# Numbers of a program's tile of widths.
TILE = 512
WARPS = 4


# -- one element, whatever its memory ----------------------------------------------------------------------------------


@triton.jit
def shares(raw, SPLINE: tl.constexpr):
    """Shares [E, BK] of the bins in the box, before the least size: a softmax over the K columns of raw; 0 behind them."""
    raw = raw * SPLINE[SCALE]
    if SPLINE[SOFT_CLIP]:
        raw = raw / (1.0 + tl.abs(2.0 * raw / SPLINE[CLIP]))
    raw = tl.where(tl.arange(0, raw.shape[1])[None, :] < SPLINE[BINS], raw, float("-inf"))
    e = tl.exp(raw - tl.max(raw, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def shares_backward(raw, p, k, before, here, grad_knot, grad_size, LEAST: tl.constexpr, SPLINE: tl.constexpr):
    """∂raw [E, BK] from those of a bin's first knot and its size [E]; p = shares(raw), `before` the sum of those before bin k.

    The knot moves with the sizes of the bins before it: ∂size_j is ∂knot for j < k, ∂size for j = k, 0 behind.
    """
    j = tl.arange(0, raw.shape[1])[None, :]
    size = tl.where(j < k[:, None], grad_knot[:, None], tl.where(j == k[:, None], grad_size[:, None], 0.0))
    mean = grad_knot * before + grad_size * here  # Σ p_j ∂size_j
    GROWTH: tl.constexpr = (SPLINE[HIGH] - SPLINE[LOW]) * (1 - SPLINE[BINS] * LEAST) * SPLINE[SCALE]
    grad = GROWTH * p * (size - mean[:, None])
    if SPLINE[SOFT_CLIP]:
        d = 1.0 + tl.abs((2.0 * SPLINE[SCALE]) * raw / SPLINE[CLIP])
        grad = grad / (d * d)
    return grad


@triton.jit
def knot(count, before, LEAST: tl.constexpr, SPLINE: tl.constexpr):
    """Where a bin begins behind `count` others whose shares sum to `before`."""
    size: tl.constexpr = SPLINE[HIGH] - SPLINE[LOW]
    return SPLINE[LOW] + size * (LEAST * count.to(before.dtype) + (1 - SPLINE[BINS] * LEAST) * before)


@triton.jit
def find(at, searched, other, LEAST: tl.constexpr, SPLINE: tl.constexpr):
    """The bin k [E] of `at`, and its own share and the sum of those before it, of the searched side and of the other one.

    The knot of the searched side is made of the same running sum that `at` was compared with.
    """
    j = tl.arange(0, searched.shape[1])[None, :]
    sums = tl.cumsum(searched, 1)
    passed = (at[:, None] >= knot(j + 1, sums, LEAST, SPLINE)) & (j < SPLINE[BINS] - 1)
    k = tl.sum(passed.to(tl.int32), 1)
    here = j == k[:, None]
    before = tl.sum(tl.where(j == k[:, None] - 1, sums, 0.0), 1)
    other_before = tl.sum(tl.where(j < k[:, None], other, 0.0), 1)
    return (
        k, before, tl.sum(tl.where(here, searched, 0.0), 1), other_before, tl.sum(tl.where(here, other, 0.0), 1),
    )  # fmt: skip


@triton.jit
def at_ends(k, BC: tl.constexpr, SPLINE: tl.constexpr):
    """Two masks [E, BC]: which of a network's numbers for slopes belongs to the first and to the last knot of bin k."""
    j = tl.arange(0, BC)[None, :]
    if SPLINE[TAILS] < 0:  # linear: the first knot has none
        j += 1
    last = k + 1
    if SPLINE[TAILS] == 0:  # circular
        last = tl.where(last == SPLINE[BINS], 0, last)
    return j == k[:, None], j == last[:, None]


@triton.jit
def slope(c, SPLINE: tl.constexpr):
    """δ of a network's number."""
    if SPLINE[SOFT_CLIP]:
        return tl.exp(c / (1.0 + tl.abs(c / SPLINE[CLIP])))
    else:
        return SPLINE[FACTOR] * (SPLINE[MIN_DERIVATIVE] - log_sigmoid(-c))  # softplus(c)


@triton.jit
def slope_growth(c, SPLINE: tl.constexpr):
    """∂δ/∂c."""
    if SPLINE[SOFT_CLIP]:
        d = 1.0 + tl.abs(c / SPLINE[CLIP])
        return tl.exp(c / d) / (d * d)
    else:
        return SPLINE[FACTOR] * sigmoid(c)


@triton.jit
def end_slopes(k, c, SPLINE: tl.constexpr):
    """The network's numbers [E] for the slopes at both ends of bin k, and these slopes."""
    first, last = at_ends(k, c.shape[1], SPLINE)
    c0 = tl.sum(tl.where(first, c, 0.0), 1)
    c1 = tl.sum(tl.where(last, c, 0.0), 1)
    d0 = slope(c0, SPLINE)
    d1 = slope(c1, SPLINE)
    if SPLINE[TAILS] < 0:
        d0 = tl.where(k == 0, 1.0, d0)
        d1 = tl.where(k == SPLINE[BINS] - 1, 1.0, d1)
    return c0, c1, d0, d1


@triton.jit
def root(above, h, s, d0, d1):
    """ξ of the place in a bin that lies `above` its first knot: eqs. 6 to 8, and the root of eq. 29."""
    bend = above * (d0 + d1 - 2.0 * s)
    a2 = h * (s - d0) + bend
    a1 = h * d0 - bend
    a0 = -s * above
    TINY: tl.constexpr = 2.2250738585072014e-308 if h.dtype == tl.float64 else 1.1754943508222875e-38
    discriminant = tl.maximum(a1 * a1 - 4.0 * a2 * a0, TINY, propagate_nan=tl.PropagateNan.ALL)
    return 2.0 * a0 / (-a1 - tl.sqrt(discriminant))


@triton.jit
def curve(xi, s, d0, d1):
    """Of a bin at ξ: numerator and denominator of (y − Y)/h (eq. 4), and y' (eq. 5)."""
    q = xi * (1.0 - xi)
    numerator = s * xi * xi + d0 * q
    denominator = s + (d0 + d1 - 2.0 * s) * q
    bend = d1 * xi * xi + 2.0 * s * q + d0 * (1.0 - xi) * (1.0 - xi)
    return numerator, denominator, s * s * bend / (denominator * denominator)


@triton.jit
def curve_backward(xi, w, h, s, d0, d1, grad_y, grad_log):
    """Gradients of grad_y·y + grad_log·log y' with respect to x, w, h, δ₀ and δ₁, where ξ = (x − X)/w and s = h/w.

    That of Y is grad_y, that of X minus x's.
    """
    q = xi * (1.0 - xi)
    turn = 1.0 - 2.0 * xi
    rest = (1.0 - xi) * (1.0 - xi)
    c = d0 + d1 - 2.0 * s
    D = s + c * q
    R = (s * xi * xi + d0 * q) / D
    E = d1 * xi * xi + 2.0 * s * q + d0 * rest
    g_N = grad_y * h / D
    g_D = -g_N * R - 2.0 * grad_log / D
    g_E = grad_log / E
    g_xi = (
        g_N * (2.0 * s * xi + d0 * turn)
        + g_D * c * turn
        + g_E * (2.0 * d1 * xi + 2.0 * s * turn - 2.0 * d0 * (1.0 - xi))
    )
    g_s = g_N * xi * xi + g_D * (1.0 - 2.0 * q) + 2.0 * g_E * q + 2.0 * grad_log / s
    g_x = g_xi / w
    g_w = -(g_s * s / w + g_x * xi)
    return g_x, g_w, grad_y * R + g_s / w, (g_N + g_D) * q + g_E * rest, g_D * q + g_E * xi * xi


@triton.jit
def bin_of(at, a, b, c, SPLINE: tl.constexpr, INVERSE: tl.constexpr):
    """The bin in which `at` [E] lies, and where in it: its number k, ξ, X, w, Y, h, s, δ₀, δ₁; and for `spline_backward`
    the shares of widths and of heights, the sums before the bin and its own ones, and the network's numbers for δ₀ and δ₁."""
    MIN_W: tl.constexpr = SPLINE[MIN_WIDTH]
    MIN_H: tl.constexpr = SPLINE[MIN_HEIGHT]
    p = shares(a, SPLINE)
    r = shares(b, SPLINE)
    if INVERSE:
        k, r_before, r_here, p_before, p_here = find(at, r, p, MIN_H, SPLINE)
    else:
        k, p_before, p_here, r_before, r_here = find(at, p, r, MIN_W, SPLINE)
    size: tl.constexpr = SPLINE[HIGH] - SPLINE[LOW]
    X = knot(k, p_before, MIN_W, SPLINE)
    Y = knot(k, r_before, MIN_H, SPLINE)
    w = size * (MIN_W + (1 - SPLINE[BINS] * MIN_W) * p_here)
    h = size * (MIN_H + (1 - SPLINE[BINS] * MIN_H) * r_here)
    s = h / w
    c0, c1, d0, d1 = end_slopes(k, c, SPLINE)
    xi = root(at - Y, h, s, d0, d1) if INVERSE else (at - X) / w
    return k, xi, X, w, Y, h, s, d0, d1, p, p_before, p_here, r, r_before, r_here, c0, c1


@triton.jit
def spline(x, a, b, c, SPLINE: tl.constexpr, INVERSE: tl.constexpr):
    """y(x) and log y'(x) [E], INVERSE: x(y) and its log-derivative; widths a, heights b [E, BK], slopes c [E, BC] as a
    network makes them, whose columns behind its numbers do not matter."""
    inside = (x >= SPLINE[LOW]) & (x <= SPLINE[HIGH])
    at = tl.where(inside, x, SPLINE[LOW])
    k, xi, X, w, Y, h, s, d0, d1, p, p_before, p_here, r, r_before, r_here, c0, c1 = bin_of(
        at, a, b, c, SPLINE, INVERSE
    )
    numerator, denominator, steepness = curve(xi, s, d0, d1)
    log = tl.log(steepness)
    if INVERSE:
        out = X + w * xi
        log = -log
    else:
        out = Y + h * numerator / denominator
    return tl.where(inside, out, x), tl.where(inside, log, 0.0)


@triton.jit
def spline_backward(x, a, b, c, grad_out, grad_log, SPLINE: tl.constexpr, INVERSE: tl.constexpr):
    """∂x [E], ∂a, ∂b [E, BK] and ∂c [E, BC] from the gradients of both results of `spline`.

    INVERSE, by the implicit function: with f = y'(x), m = ∂(log y')/∂x and t = ∂x − m ∂log, ∂y is t/f, and the parameters'
    gradients are those of the forward at x from −t/f and −∂log.
    """
    inside = (x >= SPLINE[LOW]) & (x <= SPLINE[HIGH])
    at = tl.where(inside, x, SPLINE[LOW])
    k, xi, X, w, Y, h, s, d0, d1, p, p_before, p_here, r, r_before, r_here, c0, c1 = bin_of(
        at, a, b, c, SPLINE, INVERSE
    )
    g_y = tl.where(inside, grad_out, 0.0)
    g_log = tl.where(inside, grad_log, 0.0)
    if INVERSE:
        numerator, denominator, steepness = curve(xi, s, d0, d1)
        one = xi * 0.0 + 1.0
        m, m_w, m_h, m_d0, m_d1 = curve_backward(xi, w, h, s, d0, d1, xi * 0.0, one)
        g_x = (g_y - g_log * m) / steepness
        g_y = -g_x
        g_log = -g_log
        g_X, g_w, g_h, g_d0, g_d1 = curve_backward(xi, w, h, s, d0, d1, g_y, g_log)
    else:
        g_x, g_w, g_h, g_d0, g_d1 = curve_backward(xi, w, h, s, d0, d1, g_y, g_log)
        g_X = g_x
    first, last = at_ends(k, c.shape[1], SPLINE)
    g_c = tl.where(first, (g_d0 * slope_growth(c0, SPLINE))[:, None], 0.0)
    g_c += tl.where(last, (g_d1 * slope_growth(c1, SPLINE))[:, None], 0.0)
    MIN_W: tl.constexpr = SPLINE[MIN_WIDTH]
    MIN_H: tl.constexpr = SPLINE[MIN_HEIGHT]
    g_a = shares_backward(a, p, k, p_before, p_here, -g_X, g_w, MIN_W, SPLINE)
    g_b = shares_backward(b, r, k, r_before, r_here, g_y, g_h, MIN_H, SPLINE)
    return tl.where(inside, g_x, grad_out), g_a, g_b, g_c


# -- the elementwise kernels -------------------------------------------------------------------------------------------


@triton.jit
def elements(rows, columns, parts, BM: tl.constexpr, BC: tl.constexpr):
    """A program's elements, BC columns of BM rows: its first row, its first element, the others' distances from that [BM·BC],
    which of them there are, and their rows' distances. Samples with more than one part have BM = 1."""
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64) * BM
    i = tl.arange(0, BM * BC)
    live = (row + i // BC < rows) & (part * BC + i % BC < columns)
    return row, row * columns + part * BC, i // BC * columns + i % BC, live, i // BC


@triton.jit
def tile(parameters, place, live, AT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """Pointers to columns AT … AT + WIDTH of elements' parameters [E, BN], and which of them there are."""
    j = tl.arange(0, BN)[None, :]
    return parameters + (place[:, None] * N + (AT + j)), live[:, None] & (j < WIDTH)


@triton.jit(do_not_specialize=["rows", "columns", "parts"])
def forward_kernel(
    x, parameters, y, logdet, rows, columns, parts,
    SPLINE: tl.constexpr, INVERSE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program: BC columns of BM rows. logdet [rows, parts]."""
    K: tl.constexpr = SPLINE[BINS]
    SLOPES: tl.constexpr = K + SPLINE[TAILS]
    N: tl.constexpr = 2 * K + SLOPES
    row, first, place, live, _ = elements(rows, columns, parts, BM, BC)
    parameters += first * N
    a_at, a_live = tile(parameters, place, live, 0, K, N, triton.next_power_of_2(K))
    b_at, b_live = tile(parameters, place, live, K, K, N, triton.next_power_of_2(K))
    c_at, c_live = tile(parameters, place, live, 2 * K, SLOPES, N, triton.next_power_of_2(SLOPES))
    a = tl.load(a_at, mask=a_live, other=0.0)  # [E, BK]
    b = tl.load(b_at, mask=b_live, other=0.0)
    c = tl.load(c_at, mask=c_live, other=0.0)  # [E, BC]
    x_ = tl.load(x + first + place, mask=live, other=0.0)  # [E]
    out, log = spline(x_, a, b, c, SPLINE, INVERSE)
    tl.store(y + first + place, out, mask=live)
    total = tl.sum(tl.reshape(tl.where(live, log, 0.0), (BM, BC)), 1)
    samples = row + tl.arange(0, BM)
    tl.store(logdet + samples * parts + tl.program_id(0) % parts, total, mask=samples < rows)


@triton.jit(do_not_specialize=["rows", "columns", "parts"])
def backward_kernel(
    grad_y, grad_logdet, x, parameters, grad_x, grad_parameters, rows, columns, parts,
    SPLINE: tl.constexpr, INVERSE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program: BC columns of BM rows."""
    K: tl.constexpr = SPLINE[BINS]
    SLOPES: tl.constexpr = K + SPLINE[TAILS]
    N: tl.constexpr = 2 * K + SLOPES
    row, first, place, live, sample = elements(rows, columns, parts, BM, BC)
    parameters += first * N
    grad_parameters += first * N
    a_at, a_live = tile(parameters, place, live, 0, K, N, triton.next_power_of_2(K))
    b_at, b_live = tile(parameters, place, live, K, K, N, triton.next_power_of_2(K))
    c_at, c_live = tile(parameters, place, live, 2 * K, SLOPES, N, triton.next_power_of_2(SLOPES))
    a = tl.load(a_at, mask=a_live, other=0.0)  # [E, BK]
    b = tl.load(b_at, mask=b_live, other=0.0)
    c = tl.load(c_at, mask=c_live, other=0.0)  # [E, BC]
    x_ = tl.load(x + first + place, mask=live, other=0.0)  # [E]
    g_y = tl.load(grad_y + first + place, mask=live, other=0.0)
    g_log = tl.load(grad_logdet + row + sample, mask=live, other=0.0)
    g_x, g_a, g_b, g_c = spline_backward(x_, a, b, c, g_y, g_log, SPLINE, INVERSE)
    tl.store(grad_x + first + place, g_x, mask=live)
    a_at, a_live = tile(grad_parameters, place, live, 0, K, N, triton.next_power_of_2(K))
    b_at, b_live = tile(grad_parameters, place, live, K, K, N, triton.next_power_of_2(K))
    c_at, c_live = tile(grad_parameters, place, live, 2 * K, SLOPES, N, triton.next_power_of_2(SLOPES))
    tl.store(a_at, g_a, mask=a_live)
    tl.store(b_at, g_b, mask=b_live)
    tl.store(c_at, g_c, mask=c_live)


def splines_forward(x: Tensor, parameters: Tensor, numbers: Sequence[float], inverse: bool) -> tuple[Tensor, Tensor]:
    """y like x (rows, columns), and the log-derivatives' sums (rows,); parameters (rows, columns, n), all contiguous.

    `numbers` are those of a `PreparedSpline`. One launch; where several programs share a row, a second one adds up their sums.
    """
    rows, columns = x.shape
    constants, parts = _launch(x, numbers, inverse)
    y, logdet = torch.empty_like(x), x.new_empty((rows, parts))
    programs = triton.cdiv(rows, constants["BM"]) * parts if columns else 0
    launch(forward_kernel, programs, x, x, parameters, y, logdet, rows, columns, parts, **constants)
    if columns == 0:
        logdet.zero_()
    return y, logdet.view(rows) if parts == 1 else logdet.sum(1)


def splines_backward(
    grad_y: Tensor, grad_logdet: Tensor, x: Tensor, parameters: Tensor, numbers: Sequence[float], inverse: bool
) -> tuple[Tensor, Tensor]:
    """∂x and ∂parameters; all contiguous. One launch."""
    rows, columns = x.shape
    constants, parts = _launch(x, numbers, inverse)
    grad_x, grad_parameters = torch.empty_like(x), torch.empty_like(parameters)
    programs = triton.cdiv(rows, constants["BM"]) * parts if columns else 0
    launch(
        backward_kernel, programs, x, grad_y, grad_logdet, x, parameters, grad_x, grad_parameters, rows, columns, parts,
        **constants,
    )  # fmt: skip
    return grad_x, grad_parameters


def _launch(x: Tensor, numbers: Sequence[float], inverse: bool) -> tuple[dict[str, Any], int]:
    """A kernel's constants, and the programs that share a row."""
    bins, tails, *others = numbers
    spline = (int(bins), int(tails), *others)
    size = max(1, TILE // triton.next_power_of_2(spline[0]))
    columns = min(size, triton.next_power_of_2(max(1, x.shape[1])))
    constants = {
        "SPLINE": spline, "INVERSE": inverse, "BM": size // columns, "BC": columns, "num_warps": WARPS, "num_stages": 1,
    }  # fmt: skip
    return constants, max(1, triton.cdiv(x.shape[1], columns))
