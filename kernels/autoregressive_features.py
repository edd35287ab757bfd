"""The last layer of an autoregressive step and the transform of its features, and their backward, for a range of features.

A feature d has P numbers, side by side in W_out (autoregressive_packing.py). Of an affine transform, x_d = y_d·e^f(u) + t, a
program computes FEATURES of them at once, one tile of pairs [u, t]. Of splines it computes GROUP of them, a tile for each kind
of numbers, and one thread has all numbers of a spline (spline_coupling.py). Chunks of features begin at multiples of
FEATURES or GROUP, and what lies outside of the range is neither read nor written.
"""

import triton
import triton.language as tl

from glf_fast.kernels.autoregressive_packing import up
from glf_fast.kernels.masked_mlp import masked_product, sight
from glf_fast.kernels.math import log_scale, log_scale_slope
from glf_fast.kernels.spline import BINS, TAILS, padded_bins, spline, spline_backward
from glf_fast.kernels.spline_coupling import second
from glf_fast.kernels.tiles import COMPILED

FEATURES = tl.constexpr(16)


@triton.jit
def numbers_at(
    column, last, hidden, row, live, weights, vectors, seen, D: tl.constexpr, HIDDEN: tl.constexpr,
    NUMBERS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr, SEEN: tl.constexpr,
    ROW_STRIDE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Columns [BM, J] of the last layer, none of them of a feature from `last` on that is needed."""
    LAYERS: tl.constexpr = len(HIDDEN) + 1
    OUT: tl.constexpr = up(up(D, 16) * NUMBERS)
    depth = sight(seen + SEEN[LAYERS - 1], last, HIDDEN[LAYERS - 2])
    acc = tl.zeros((BM, column.shape[0]), STATE)
    acc = masked_product(
        acc, hidden + COLUMNS[LAYERS - 2], row, live, ROW_STRIDE, weights + WEIGHTS[LAYERS - 1], column, 0, depth, OUT, 1,
        BK, PRECISION,
    )  # fmt: skip
    return acc + tl.load(vectors + VECTORS[LAYERS] + column)[None, :]


@triton.jit
def pairs_at(
    start, last, hidden, row, live, weights, vectors, seen, D: tl.constexpr, HIDDEN: tl.constexpr,
    NUMBERS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr, SEEN: tl.constexpr,
    ROW_STRIDE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """u and t [BM, FEATURES] of the features from `start` on."""
    column = start * 2 + tl.arange(0, 2 * FEATURES)
    acc = numbers_at(
        column, last, hidden, row, live, weights, vectors, seen, D, HIDDEN, NUMBERS, COLUMNS, WEIGHTS, VECTORS, SEEN,
        ROW_STRIDE, BM, BK, PRECISION, STATE,
    )  # fmt: skip
    return tl.split(tl.reshape(acc, (BM, FEATURES, 2)))


@triton.jit
def kind_at(
    start, AT: tl.constexpr, WIDTH: tl.constexpr, last, hidden, row, live, weights, vectors, seen, D: tl.constexpr,
    HIDDEN: tl.constexpr, NUMBERS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr,
    SEEN: tl.constexpr, ROW_STRIDE: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """One kind of numbers [WIDTH, BM·GROUP] of GROUP features from `start` on."""
    j = tl.arange(0, GROUP * WIDTH)
    column = (start + j // WIDTH) * NUMBERS + AT + j % WIDTH
    acc = numbers_at(
        column, last, hidden, row, live, weights, vectors, seen, D, HIDDEN, NUMBERS, COLUMNS, WEIGHTS, VECTORS, SEEN,
        ROW_STRIDE, BM, BK, PRECISION, STATE,
    )  # fmt: skip
    raw = tl.trans(tl.reshape(acc, (BM * GROUP, WIDTH)))
    if COMPILED:
        raw = tl.associative_scan(raw, 0, second)  # all numbers of a spline in one thread: see spline_coupling.raw_tile
    return raw


@triton.jit
def splines_at(
    start, last, hidden, row, live, weights, vectors, seen, D: tl.constexpr, HIDDEN: tl.constexpr,
    NUMBERS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr, SEEN: tl.constexpr,
    ROW_STRIDE: tl.constexpr, SPLINE: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Widths, heights and slopes of GROUP features from `start` on."""
    B: tl.constexpr = padded_bins(SPLINE[BINS])
    S: tl.constexpr = padded_bins(SPLINE[BINS] + SPLINE[TAILS])
    a = kind_at(
        start, 0, B, last, hidden, row, live, weights, vectors, seen, D, HIDDEN, NUMBERS, COLUMNS, WEIGHTS, VECTORS, SEEN,
        ROW_STRIDE, GROUP, BM, BK, PRECISION, STATE,
    )  # fmt: skip
    b = kind_at(
        start, B, B, last, hidden, row, live, weights, vectors, seen, D, HIDDEN, NUMBERS, COLUMNS, WEIGHTS, VECTORS, SEEN,
        ROW_STRIDE, GROUP, BM, BK, PRECISION, STATE,
    )  # fmt: skip
    c = kind_at(
        start, 2 * B, S, last, hidden, row, live, weights, vectors, seen, D, HIDDEN, NUMBERS, COLUMNS, WEIGHTS, VECTORS,
        SEEN, ROW_STRIDE, GROUP, BM, BK, PRECISION, STATE,
    )  # fmt: skip
    return a, b, c


@triton.jit
def features(
    total, begin, end, source, STRIDE: tl.constexpr, target, TO: tl.constexpr, hidden, row, live, left, weights, vectors,
    seen, D: tl.constexpr, HIDDEN: tl.constexpr, NUMBERS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr,
    VECTORS: tl.constexpr, SEEN: tl.constexpr, ROW_STRIDE: tl.constexpr, SPLINE: tl.constexpr,
    LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr, INVERSE: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """T, INVERSE: T⁻¹, of features begin … end − 1, from rows of `source` to those of `target`; total [BM] + Σ log|T'|.

    `left` rows of the program exist.
    """
    if len(SPLINE) > 0:
        e = tl.arange(0, BM * GROUP)
        for start in range(begin // GROUP * GROUP, end, GROUP):
            a, b, c = splines_at(
                start, tl.minimum(start + GROUP, end), hidden, row, live, weights, vectors, seen, D, HIDDEN, NUMBERS, COLUMNS,
                WEIGHTS, VECTORS, SEEN, ROW_STRIDE, SPLINE, GROUP, BM, BK, PRECISION, STATE,
            )  # fmt: skip
            feature = start + e % GROUP
            exists = (e // GROUP < left) & (feature >= begin) & (feature < end)
            v = tl.load(source + e // GROUP * STRIDE + feature, mask=exists, other=0.0)
            w, log = spline(v, a, b, c, SPLINE, INVERSE)
            tl.store(target + e // GROUP * TO + feature, w, mask=exists)
            total += tl.sum(tl.reshape(tl.where(exists, log, 0.0), (BM, GROUP)), 1)
    else:
        for start in range(begin // FEATURES * FEATURES, end, FEATURES):
            u, t = pairs_at(
                start, tl.minimum(start + FEATURES, end), hidden, row, live, weights, vectors, seen, D, HIDDEN, NUMBERS,
                COLUMNS, WEIGHTS, VECTORS, SEEN, ROW_STRIDE, BM, BK, PRECISION, STATE,
            )  # fmt: skip
            feature = start + tl.arange(0, FEATURES)
            exists = live[:, None] & ((feature >= begin) & (feature < end))[None, :]
            v = tl.load(source + row[:, None] * STRIDE + feature[None, :], mask=exists, other=0.0)
            ell = tl.where(exists, log_scale(u, LOG_SCALE, CONSTANT), 0.0)
            if INVERSE:
                ell = -ell
                w = (v - t) * tl.exp(ell)
            else:
                w = v * tl.exp(ell) + t
            tl.store(target + row[:, None] * TO + feature[None, :], w, mask=exists)
            total += tl.sum(ell, 1)
    return total


@triton.jit
def store_kind(slopes, grad, number, exists, AT: tl.constexpr):
    """Gradients [WIDTH, E] of one kind of numbers of the splines whose numbers begin at `number` [E]; padding gets zeros."""
    j = tl.arange(0, grad.shape[0])[:, None]
    mask = exists[None, :] & (j >= 0)
    tl.store(slopes + (number[None, :] + AT + j), grad.to(slopes.dtype.element_ty), mask=mask)


@triton.jit
def features_backward(
    begin, end, y, WORK: tl.constexpr, grads, STRIDE: tl.constexpr, target, TO: tl.constexpr, g_logdet, hidden, slopes, row,
    live, left, weights, vectors, seen, D: tl.constexpr, HIDDEN: tl.constexpr, NUMBERS: tl.constexpr,
    COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr, SEEN: tl.constexpr,
    ROW_STRIDE: tl.constexpr, SPLINE: tl.constexpr, LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr,
    INVERSE: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """From the gradients `grads` of what T (INVERSE: T⁻¹) makes of features begin … end − 1, those of what it is given, to
    `target`, and those of their numbers, to `slopes`. `y` has the side on which the network is; g_logdet [BM].

    x = y·e^ℓ + t: ∂y = ∂x·e^ℓ, ∂t = ∂x, ∂ℓ = ∂y·y + ∂logdet; y = (x − t)·e^−ℓ: ∂x = ∂y·e^−ℓ, ∂t = −∂x, ∂ℓ = −∂y·y − ∂logdet.
    """
    of_numbers = slopes + COLUMNS[len(COLUMNS) - 1]
    if len(SPLINE) > 0:
        e = tl.arange(0, BM * GROUP)
        g_log = tl.reshape(tl.broadcast_to(g_logdet[:, None], (BM, GROUP)), (BM * GROUP,))
        B: tl.constexpr = padded_bins(SPLINE[BINS])
        for start in range(begin // GROUP * GROUP, end, GROUP):
            a, b, c = splines_at(
                start, tl.minimum(start + GROUP, end), hidden, row, live, weights, vectors, seen, D, HIDDEN, NUMBERS, COLUMNS,
                WEIGHTS, VECTORS, SEEN, ROW_STRIDE, SPLINE, GROUP, BM, BK, PRECISION, STATE,
            )  # fmt: skip
            feature = start + e % GROUP
            exists = (e // GROUP < left) & (feature >= begin) & (feature < end)
            v = tl.load(y + e // GROUP * WORK + feature, mask=exists, other=0.0)
            g = tl.load(grads + e // GROUP * STRIDE + feature, mask=exists, other=0.0)
            if INVERSE:
                v, _ = spline(v, a, b, c, SPLINE, False)
            g_v, g_a, g_b, g_c = spline_backward(v, a, b, c, g, g_log, SPLINE, INVERSE)
            tl.store(target + e // GROUP * TO + feature, g_v, mask=exists)
            number = e // GROUP * ROW_STRIDE + feature * NUMBERS
            store_kind(of_numbers, g_a, number, exists, 0)
            store_kind(of_numbers, g_b, number, exists, B)
            store_kind(of_numbers, g_c, number, exists, 2 * B)
    else:
        for start in range(begin // FEATURES * FEATURES, end, FEATURES):
            u, _ = pairs_at(
                start, tl.minimum(start + FEATURES, end), hidden, row, live, weights, vectors, seen, D, HIDDEN, NUMBERS,
                COLUMNS, WEIGHTS, VECTORS, SEEN, ROW_STRIDE, BM, BK, PRECISION, STATE,
            )  # fmt: skip
            feature = start + tl.arange(0, FEATURES)
            exists = live[:, None] & ((feature >= begin) & (feature < end))[None, :]
            v = tl.load(y + row[:, None] * WORK + feature[None, :], mask=exists, other=0.0)
            g = tl.load(grads + row[:, None] * STRIDE + feature[None, :], mask=exists, other=0.0)
            ell = log_scale(u, LOG_SCALE, CONSTANT)
            if INVERSE:
                g_v = g * tl.exp(-ell)
                g_t = -g_v
                g_ell = -g * v - g_logdet[:, None]
            else:
                g_v = g * tl.exp(ell)
                g_t = g
                g_ell = g_v * v + g_logdet[:, None]
            tl.store(target + row[:, None] * TO + feature[None, :], g_v, mask=exists)
            g_u = g_ell * log_scale_slope(u, LOG_SCALE, CONSTANT)
            both = tl.reshape(tl.join(g_u, g_t), (BM, 2 * FEATURES))
            column = start * 2 + tl.arange(0, 2 * FEATURES)
            mask = live[:, None] & ((column >= begin * 2) & (column < end * 2))[None, :]
            at = row[:, None] * ROW_STRIDE + column[None, :]
            tl.store(of_numbers + at, both.to(slopes.dtype.element_ty), mask=mask)
