"""Rational-quadratic splines in one launch each way: softmax, running sums, search, spline, log-derivative and its sum.

`glf_fast.reference.spline` specifies the function. An element is one number x with N parameters: K of widths, K of heights,
then those of slopes. They are three tiles [power of two, elements], whose rows are bins, or slopes. A value of the element's
own bin is a sum over a tile in which a mask leaves one row, so no array is indexed. The backward computes all of it again from
x and the parameters.

`spline` and `spline_backward` know nothing of memory: any kernel that has the three tiles in registers can call them. SPLINE is
the tuple of `PreparedSpline.numbers()` (`constants`), in which BINS … SCALE are places.

In the elementwise kernels a thread has all numbers of one element (`load_tile`), so that sums over bins stay in the thread:
forward with 8 bins a warp takes 21 instructions an element, with 32 bins 64 to 74. With the bins spread over threads, which is
what Triton makes of a load of contiguous bins, these were 92 and 400 (Triton 3.9, sm_90, counted and not timed). A warp then
reads an element's numbers one by one, all but the first from the L1 cache; gradients are written by threads next to each other.
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

__all__ = [
    "constants",
    "padded_bins",
    "spline",
    "spline_backward",
    "spline_backward_kernel",
    "spline_kernel",
    "splines_backward",
    "splines_forward",
]

BINS, TAILS, SOFT_CLIP, LOW, HIGH = (tl.constexpr(i) for i in range(5))
MIN_WIDTH, MIN_HEIGHT, MIN_DERIVATIVE, FACTOR, CLIP, SCALE = (tl.constexpr(i) for i in range(5, 11))
# Elements of a program: one for each thread of a warp, so that few elements have many programs; in the forward up to LARGEST,
# where a row has as many columns, whose log-derivatives the program adds up.
WARP = 32
LARGEST = 128


@triton.constexpr_function
def padded_bins(count):
    """Numbers of one kind of one spline as they are packed for whole flows: 8 at least, so that two splines make 16."""
    return max(8, triton.next_power_of_2(count))


# -- one element, whatever its memory ----------------------------------------------------------------------------------


@triton.jit
def shares(raw, SPLINE: tl.constexpr):
    """Scaled and clipped numbers t [BK, E] for sizes; and their softmax over the K bins, 0 behind them: the bins' shares in
    what the least sizes leave of the box."""
    t = raw * SPLINE[SCALE]
    if SPLINE[SOFT_CLIP]:
        t = t / (1.0 + tl.abs(2.0 * t / SPLINE[CLIP]))
    bins = tl.where(tl.arange(0, raw.shape[0])[:, None] < SPLINE[BINS], t, float("-inf"))
    e = tl.exp(bins - tl.max(bins, 0)[None, :])
    return t, e / tl.sum(e, 0)[None, :]


@triton.jit
def shares_backward(t, p, k, before, here, grad_knot, grad_size, LEAST: tl.constexpr, SPLINE: tl.constexpr):
    """∂raw [BK, E] from those of bin k's first knot and its size [E]; t, p = shares(raw), of which `here` is the bin's and
    `before` the sum of those before it.

    The knot moves with the sizes of the bins before it: ∂size_j is ∂knot for j < k, ∂size for j = k, 0 behind.
    """
    j = tl.arange(0, t.shape[0])[:, None]
    size = tl.where(j < k[None, :], grad_knot[None, :], tl.where(j == k[None, :], grad_size[None, :], 0.0))
    mean = grad_knot * before + grad_size * here  # Σ p_j ∂size_j
    GROWTH: tl.constexpr = (SPLINE[HIGH] - SPLINE[LOW]) * (1 - SPLINE[BINS] * LEAST) * SPLINE[SCALE]
    grad = GROWTH * p * (size - mean[None, :])  # 0 behind the bins, where p is
    if SPLINE[SOFT_CLIP]:
        rest = 1.0 - tl.abs(2.0 * t / SPLINE[CLIP])  # 1 / (1 + |2 raw / CLIP|)
        grad = grad * rest * rest
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
    j = tl.arange(0, searched.shape[0])[:, None]
    sums = tl.cumsum(searched, 0)
    passed = (at[None, :] >= knot(j + 1, sums, LEAST, SPLINE)) & (j < SPLINE[BINS] - 1)
    k = tl.sum(passed.to(tl.int32), 0)
    here = j == k[None, :]
    before = tl.sum(tl.where(j == k[None, :] - 1, sums, 0.0), 0)
    other_before = tl.sum(tl.where(j < k[None, :], other, 0.0), 0)
    return (
        k, before, tl.sum(tl.where(here, searched, 0.0), 0), other_before, tl.sum(tl.where(here, other, 0.0), 0),
    )  # fmt: skip


@triton.jit
def at_ends(k, BC: tl.constexpr, SPLINE: tl.constexpr):
    """Two masks [BC, E]: which of a network's numbers for slopes belongs to the first and to the last knot of bin k."""
    j = tl.arange(0, BC)[:, None]
    if SPLINE[TAILS] < 0:  # linear: the first knot has none
        j += 1
    last = k + 1
    if SPLINE[TAILS] == 0:  # circular
        last = tl.where(last == SPLINE[BINS], 0, last)
    return j == k[None, :], j == last[None, :]


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
    first, last = at_ends(k, c.shape[0], SPLINE)
    c0 = tl.sum(tl.where(first, c, 0.0), 0)
    c1 = tl.sum(tl.where(last, c, 0.0), 0)
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
    """The bin in which `at` [E] lies, and where in it: its number k, ξ, X, w, Y, h, s, δ₀, δ₁. For `spline_backward` also what
    `shares` returns of widths, with the shares' sum before the bin and the bin's own, the same of heights, and the network's
    numbers for δ₀ and δ₁."""
    MIN_W: tl.constexpr = SPLINE[MIN_WIDTH]
    MIN_H: tl.constexpr = SPLINE[MIN_HEIGHT]
    t_a, p = shares(a, SPLINE)
    t_b, r = shares(b, SPLINE)
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
    return k, xi, X, w, Y, h, s, d0, d1, t_a, p, p_before, p_here, t_b, r, r_before, r_here, c0, c1


@triton.jit
def spline(x, a, b, c, SPLINE: tl.constexpr, INVERSE: tl.constexpr):
    """y(x) and log y'(x) [E], INVERSE: x(y) and its log-derivative; widths a, heights b [BK, E], slopes c [BC, E] as a
    network makes them; rows behind its numbers do not matter."""
    inside = (x >= SPLINE[LOW]) & (x <= SPLINE[HIGH])
    at = tl.where(inside, x, SPLINE[LOW])
    _, xi, X, w, Y, h, s, d0, d1, _, _, _, _, _, _, _, _, _, _ = bin_of(at, a, b, c, SPLINE, INVERSE)
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
    """∂x [E], ∂a, ∂b [BK, E] and ∂c [BC, E] from the gradients of both results of `spline`.

    INVERSE, by the implicit function: with f = y'(x), m = ∂(log y')/∂x and t = ∂x − m ∂log, ∂y is t/f, and the parameters'
    gradients are those of the forward at x from −t/f and −∂log.
    """
    inside = (x >= SPLINE[LOW]) & (x <= SPLINE[HIGH])
    at = tl.where(inside, x, SPLINE[LOW])
    k, xi, _, w, _, h, s, d0, d1, t_a, p, p_before, p_here, t_b, r, r_before, r_here, c0, c1 = bin_of(
        at, a, b, c, SPLINE, INVERSE
    )
    g_y = tl.where(inside, grad_out, 0.0)
    g_log = tl.where(inside, grad_log, 0.0)
    if INVERSE:
        _, _, steepness = curve(xi, s, d0, d1)
        one = xi * 0.0 + 1.0
        m, _, _, _, _ = curve_backward(xi, w, h, s, d0, d1, xi * 0.0, one)
        g_x = (g_y - g_log * m) / steepness
        g_y = -g_x
        g_log = -g_log
        g_X, g_w, g_h, g_d0, g_d1 = curve_backward(xi, w, h, s, d0, d1, g_y, g_log)
    else:
        g_x, g_w, g_h, g_d0, g_d1 = curve_backward(xi, w, h, s, d0, d1, g_y, g_log)
        g_X = g_x
    first, last = at_ends(k, c.shape[0], SPLINE)
    g_c = tl.where(first, (g_d0 * slope_growth(c0, SPLINE))[None, :], 0.0)
    g_c += tl.where(last, (g_d1 * slope_growth(c1, SPLINE))[None, :], 0.0)
    MIN_W: tl.constexpr = SPLINE[MIN_WIDTH]
    MIN_H: tl.constexpr = SPLINE[MIN_HEIGHT]
    g_a = shares_backward(t_a, p, k, p_before, p_here, -g_X, g_w, MIN_W, SPLINE)
    g_b = shares_backward(t_b, r, k, r_before, r_here, g_y, g_h, MIN_H, SPLINE)
    return tl.where(inside, g_x, grad_out), g_a, g_b, g_c


# -- the elementwise kernels -------------------------------------------------------------------------------------------


@triton.jit
def first_element(columns, parts, BM: tl.constexpr, BC: tl.constexpr):
    """A program's first row and its first element. It has BC columns of BM rows; BM = 1 where several programs share a row."""
    row = (tl.program_id(0) // parts).to(tl.int64) * BM
    return row, row * columns + tl.program_id(0) % parts * BC


@triton.jit
def elements(i, rows, columns, parts, BM: tl.constexpr, BC: tl.constexpr):
    """Of elements i < BM·BC of a program: distances from its first row and from its first element, and which of them exist."""
    row, _ = first_element(columns, parts, BM, BC)
    live = (row + i // BC < rows) & (tl.program_id(0) % parts * BC + i % BC < columns)
    return i // BC, (i // BC * columns + i % BC).to(tl.int64), live


@triton.jit
def load_tile(
    parameters, rows, columns, parts, AT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Numbers AT … AT + WIDTH of each element's N [power of two, BM·BC]; a thread has all of one element.

    Loaded in one dimension, whose order over threads is certain. Of two dimensions without contiguous numbers Triton 3.6 lets
    the first run over threads, 3.9 the last.
    """
    ROWS: tl.constexpr = triton.next_power_of_2(WIDTH)
    i = tl.arange(0, ROWS * BM * BC)
    _, place, live = elements(i % (BM * BC), rows, columns, parts, BM, BC)
    j = i // (BM * BC)
    x = tl.load(parameters + (place * N + (AT + j)), mask=live & (j < WIDTH), other=0.0)
    return tl.reshape(x, (ROWS, BM * BC))


@triton.jit
def store_tile(parameters, x, place, live, AT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """Writes numbers AT … AT + WIDTH of each element's N: threads next to each other write bins next to each other."""
    j = tl.arange(0, x.shape[0])[:, None]
    tl.store(parameters + (place[None, :] * N + (AT + j)), x, mask=live[None, :] & (j < WIDTH))


@triton.jit(do_not_specialize=["rows", "columns", "parts"])
def spline_kernel(
    x, parameters, y, logdet, rows, columns, parts,
    SPLINE: tl.constexpr, INVERSE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program: BC columns of BM rows. logdet [rows, parts]."""
    K: tl.constexpr = SPLINE[BINS]
    SLOPES: tl.constexpr = K + SPLINE[TAILS]
    N: tl.constexpr = 2 * K + SLOPES
    row, first = first_element(columns, parts, BM, BC)
    _, place, live = elements(tl.arange(0, BM * BC), rows, columns, parts, BM, BC)
    a = load_tile(parameters + first * N, rows, columns, parts, 0, K, N, BM, BC)
    b = load_tile(parameters + first * N, rows, columns, parts, K, K, N, BM, BC)
    c = load_tile(parameters + first * N, rows, columns, parts, 2 * K, SLOPES, N, BM, BC)
    out, log = spline(tl.load(x + first + place, mask=live, other=0.0), a, b, c, SPLINE, INVERSE)
    tl.store(y + first + place, out, mask=live)
    total = tl.sum(tl.reshape(tl.where(live, log, 0.0), (BM, BC)), 1)
    samples = row + tl.arange(0, BM)
    tl.store(logdet + samples * parts + tl.program_id(0) % parts, total, mask=samples < rows)


@triton.jit(do_not_specialize=["rows", "columns", "parts"])
def spline_backward_kernel(
    grad_y, grad_logdet, x, parameters, grad_x, grad_parameters, rows, columns, parts,
    SPLINE: tl.constexpr, INVERSE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program: BC columns of BM rows."""
    K: tl.constexpr = SPLINE[BINS]
    SLOPES: tl.constexpr = K + SPLINE[TAILS]
    N: tl.constexpr = 2 * K + SLOPES
    row, first = first_element(columns, parts, BM, BC)
    sample, place, live = elements(tl.arange(0, BM * BC), rows, columns, parts, BM, BC)
    a = load_tile(parameters + first * N, rows, columns, parts, 0, K, N, BM, BC)
    b = load_tile(parameters + first * N, rows, columns, parts, K, K, N, BM, BC)
    c = load_tile(parameters + first * N, rows, columns, parts, 2 * K, SLOPES, N, BM, BC)
    x_ = tl.load(x + first + place, mask=live, other=0.0)  # [E]
    g_y = tl.load(grad_y + first + place, mask=live, other=0.0)
    g_log = tl.load(grad_logdet + row + sample, mask=live, other=0.0)
    g_x, g_a, g_b, g_c = spline_backward(x_, a, b, c, g_y, g_log, SPLINE, INVERSE)
    tl.store(grad_x + first + place, g_x, mask=live)
    store_tile(grad_parameters + first * N, g_a, place, live, 0, K, N)
    store_tile(grad_parameters + first * N, g_b, place, live, K, K, N)
    store_tile(grad_parameters + first * N, g_c, place, live, 2 * K, SLOPES, N)


def constants(numbers: Sequence[float]) -> tuple[Any, ...]:
    """SPLINE of the kernels, from the numbers of a `PreparedSpline`: of the first three the compiler needs their own types."""
    bins, tails, soft_clip, *others = numbers
    return (int(bins), int(tails), bool(soft_clip), *others)


def splines_forward(x: Tensor, parameters: Tensor, numbers: Sequence[float], inverse: bool) -> tuple[Tensor, Tensor]:
    """y like x (rows, columns), and the log-derivatives' sums (rows,); parameters (rows, columns, n), all contiguous.

    `numbers` are those of a `PreparedSpline`. One launch, and a second one for the sums of rows that several programs share.
    """
    rows, columns = x.shape
    programs, parts, made = _launch(x, numbers, inverse, LARGEST)
    y, logdet = torch.empty_like(x), x.new_empty((rows, parts))
    launch(spline_kernel, programs, x, x, parameters, y, logdet, rows, columns, parts, **made)
    if columns == 0:
        logdet.zero_()
    return y, logdet.view(rows) if parts == 1 else logdet.sum(1)


def splines_backward(
    grad_y: Tensor, grad_logdet: Tensor, x: Tensor, parameters: Tensor, numbers: Sequence[float], inverse: bool
) -> tuple[Tensor, Tensor]:
    """∂x and ∂parameters; all contiguous. One launch."""
    rows, columns = x.shape
    programs, parts, made = _launch(x, numbers, inverse, WARP)
    grad_x, grad_parameters = torch.empty_like(x), torch.empty_like(parameters)
    launch(
        spline_backward_kernel, programs, x, grad_y, grad_logdet, x, parameters, grad_x, grad_parameters, rows, columns, parts,
        **made,
    )  # fmt: skip
    return grad_x, grad_parameters


def _launch(x: Tensor, numbers: Sequence[float], inverse: bool, largest: int) -> tuple[int, int, dict[str, Any]]:
    """The number of programs, how many of them share a row, and a kernel's constants; `largest`: elements of a program."""
    rows, columns = x.shape
    width = min(largest, triton.next_power_of_2(max(1, columns)))
    samples = max(1, WARP // width)
    parts = max(1, triton.cdiv(columns, width))
    made = {
        "SPLINE": constants(numbers), "INVERSE": inverse, "BM": samples, "BC": width,
        "num_warps": samples * width // WARP, "num_stages": 1,
    }  # fmt: skip
    return triton.cdiv(rows, samples) * parts if columns else 0, parts, made
