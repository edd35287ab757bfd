"""The last layer of a step and its splines, a group of transformed columns at a time, and their backward.

A column of v has 3K − 1, 3K or 3K + 1 numbers for its spline, so that the numbers of all columns are too wide for one tile. For
GROUP columns the rows of the last hidden layer, which stand in memory (mlp.py), are multiplied with the columns of W_out that
make widths, heights and slopes. These three tiles [BM, GROUP·bins] become [bins, BM·GROUP], so that a thread has all numbers of
one row's spline of one column (`Launch.group`). Only w and Σ log w' leave the chip.

W_out is packed for this (packing.py): all widths, then all heights, then all slopes, each column's padded to a power of two, so
that no tile needs a mask. In the backward the gradients of these numbers stand in memory in the order of the network, as the
products for the weights read them. For ∂h they are multiplied with a second copy of W_out, which is packed in that order.

Triton cannot cut columns out of the register tiles v and ∂v: they pass through memory, and so do the coupling's results.
"""

import triton
import triton.language as tl

from glf_fast.kernels.spline import BINS, TAILS, padded_bins, spline, spline_backward
from glf_fast.kernels.tiles import COMPILED, load_bias, product, store_tile


@triton.jit
def load_v(rows_of, row, live, D: tl.constexpr, HALF: tl.constexpr):
    """T columns [BM, HALF] of rows of D numbers; zero in dead rows and padded columns."""
    T: tl.constexpr = D // 2
    half = tl.arange(0, HALF)
    mask = live[:, None] & (half < T)[None, :]
    return tl.load(rows_of + row[:, None] * D + half[None, :], mask=mask, other=0.0)


@triton.jit
def second(a, b):
    """The operator of a scan that changes nothing."""
    return b


@triton.jit
def raw_tile(
    hidden, row, live, w, b, start, ROW_STRIDE: tl.constexpr, N: tl.constexpr, N_PADDED: tl.constexpr,
    COLUMNS_OUT: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """One kind of numbers [WIDTH, BM·GROUP] of GROUP columns from `start` on; w and b point to this kind's part."""
    column = start * WIDTH + tl.arange(0, GROUP * WIDTH)
    acc = tl.zeros((BM, GROUP * WIDTH), STATE)
    acc = product(
        acc, hidden, row, live, ROW_STRIDE, w, column, N, N_PADDED, FEATURES * WIDTH, COLUMNS_OUT, 1, BK, PRECISION
    )
    acc += load_bias(b, column, FEATURES * WIDTH)
    raw = tl.trans(tl.reshape(acc, (BM * GROUP, WIDTH)))
    if COMPILED:
        # A scan takes the layout of new tiles, in which a thread has all numbers of a spline. This scan has no instructions.
        # Without it the layout of the product's results is kept: four threads share a spline and repeat its arithmetic. The
        # forward of 8 bins then has 2,320 instead of 1,952 instructions, and 84 instead of 12 shuffles (D 20, H 64, sm_90).
        raw = tl.associative_scan(raw, 0, second)
    return raw


@triton.jit
def raw_tiles(
    hidden, row, live, weights, vectors, start, D: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTS: tl.constexpr, VECTORS: tl.constexpr, ROW_STRIDE: tl.constexpr, SPLINE: tl.constexpr, BM: tl.constexpr,
    GROUP: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Numbers of widths and heights [bins, BM·GROUP] and of slopes [slopes, BM·GROUP] of GROUP columns from `start` on."""
    LAST: tl.constexpr = len(HIDDEN) - 1
    N: tl.constexpr = HIDDEN[LAST]
    N_PADDED: tl.constexpr = COLUMNS[LAST + 1] - COLUMNS[LAST]
    FEATURES: tl.constexpr = (D // 2 + 15) // 16 * 16
    BW: tl.constexpr = padded_bins(SPLINE[BINS])
    CW: tl.constexpr = padded_bins(SPLINE[BINS] + SPLINE[TAILS])
    OUT: tl.constexpr = FEATURES * (2 * BW + CW)
    h = hidden + COLUMNS[LAST]
    w = weights + WEIGHTS[LAST + 1]
    b = vectors + VECTORS[LAST + 2]
    AT_B: tl.constexpr = FEATURES * BW
    AT_C: tl.constexpr = 2 * FEATURES * BW
    a_tile = raw_tile(
        h, row, live, w, b, start, ROW_STRIDE, N, N_PADDED, OUT, FEATURES, BW, BM, GROUP, BK, PRECISION, STATE
    )
    b_tile = raw_tile(
        h, row, live, w + AT_B, b + AT_B, start, ROW_STRIDE, N, N_PADDED, OUT, FEATURES, BW, BM, GROUP, BK, PRECISION, STATE
    )  # fmt: skip
    c_tile = raw_tile(
        h, row, live, w + AT_C, b + AT_C, start, ROW_STRIDE, N, N_PADDED, OUT, FEATURES, CW, BM, GROUP, BK, PRECISION, STATE
    )  # fmt: skip
    return a_tile, b_tile, c_tile


@triton.jit
def spline_coupling(
    v, hidden, weights, vectors, scratch, row, live, left, D: tl.constexpr, HALF: tl.constexpr, HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr, ROW_STRIDE: tl.constexpr,
    SPLINE: tl.constexpr, INVERSE: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w [BM, HALF] and Σ log w' [BM] of v; INVERSE: v and Σ log v' of w. The last hidden layer is complete in `hidden`.

    `left` rows of the program exist; `scratch` has BM rows of D numbers.
    """
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    BM: tl.constexpr = v.shape[0]
    e = tl.arange(0, BM * GROUP)
    total = tl.zeros((BM,), v.dtype)
    store_tile(scratch + P, v, row, live, D, tl.arange(0, HALF), T)
    tl.debug_barrier()
    for start in range(0, T, GROUP):
        a, b, c = raw_tiles(
            hidden, row, live, weights, vectors, start, D, HIDDEN, COLUMNS, WEIGHTS, VECTORS, ROW_STRIDE, SPLINE, BM,
            GROUP, BK, PRECISION, v.dtype,
        )  # fmt: skip
        exists = (e // GROUP < left) & (start + e % GROUP < T)
        at = scratch + (e // GROUP * D + start + e % GROUP)
        out, log = spline(tl.load(at + P, mask=exists, other=0.0), a, b, c, SPLINE, INVERSE)
        tl.store(at, out, mask=exists)  # not where v stands, which another thread may read later
        total += tl.sum(tl.reshape(tl.where(exists, log, 0.0), (BM, GROUP)), 1)
    tl.debug_barrier()
    w = load_v(scratch, row, live, D, HALF)
    tl.debug_barrier()  # whoever writes there next waits until all is read
    return w, total


@triton.jit
def store_raw(rows_of, x, row, exists, AT: tl.constexpr, WIDTH: tl.constexpr):
    """Writes numbers AT … AT + WIDTH of the splines whose numbers begin at `row` [E]."""
    j = tl.arange(0, x.shape[0])[:, None]
    mask = exists[None, :] & (j < WIDTH)
    tl.store(rows_of + (row[None, :] + AT + j), x.to(rows_of.dtype.element_ty), mask=mask)


@triton.jit
def spline_coupling_backward(
    v, g_v, g_logdet, hidden, slopes, weights, vectors, scratch, other, row, live, left, D: tl.constexpr,
    HALF: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr,
    ROW_STRIDE: tl.constexpr, SPLINE: tl.constexpr, INVERSE: tl.constexpr, SAVED: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The coupling's other side and the gradient of its input [BM, HALF]; writes the gradients of its numbers into `slopes`.

    v [BM, HALF] is the coupling's input if SAVED, else its output; with INVERSE both are the inverse coupling's. g_v and
    g_logdet [BM, 1] are the gradients of its output and of Σ log. The other side of a SAVED forward coupling is not computed:
    v is returned. `scratch` and `other` have BM rows of D numbers each.
    """
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    BM: tl.constexpr = v.shape[0]
    K: tl.constexpr = SPLINE[BINS]
    SLOPES: tl.constexpr = K + SPLINE[TAILS]
    NUMBERS: tl.constexpr = 2 * K + SLOPES
    e = tl.arange(0, BM * GROUP)
    half = tl.arange(0, HALF)
    store_tile(scratch + P, v, row, live, D, half, T)
    store_tile(scratch, g_v, row, live, D, half, T)
    tl.debug_barrier()
    g_log = tl.reshape(tl.broadcast_to(g_logdet, (BM, GROUP)), (BM * GROUP,))
    for start in range(0, T, GROUP):
        a, b, c = raw_tiles(
            hidden, row, live, weights, vectors, start, D, HIDDEN, COLUMNS, WEIGHTS, VECTORS, ROW_STRIDE, SPLINE, BM,
            GROUP, BK, PRECISION, v.dtype,
        )  # fmt: skip
        exists = (e // GROUP < left) & (start + e % GROUP < T)
        place = e // GROUP * D + start + e % GROUP
        x = tl.load(scratch + place + P, mask=exists, other=0.0)
        g = tl.load(scratch + place, mask=exists, other=0.0)
        if SAVED:
            if INVERSE:
                y, _ = spline(x, a, b, c, SPLINE, True)
                tl.store(other + place + P, y, mask=exists)
        else:
            x, _ = spline(x, a, b, c, SPLINE, not INVERSE)
            tl.store(other + place + P, x, mask=exists)
        g_x, g_a, g_b, g_c = spline_backward(x, a, b, c, g, g_log, SPLINE, INVERSE)
        tl.store(other + place, g_x, mask=exists)
        of_spline = e // GROUP * ROW_STRIDE + (start + e % GROUP) * NUMBERS
        store_raw(slopes, g_a, of_spline, exists, 0, K)
        store_raw(slopes, g_b, of_spline, exists, K, K)
        store_raw(slopes, g_c, of_spline, exists, 2 * K, SLOPES)
    tl.debug_barrier()
    found = load_v(other + P, row, live, D, HALF) if INVERSE or not SAVED else v
    grad = load_v(other, row, live, D, HALF)
    tl.debug_barrier()  # `other` has been read
    return found, grad
