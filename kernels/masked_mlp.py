"""The masked network of one autoregressive step, and its backward, on rows in memory.

A program owns BM rows. All that they are stands in memory, as staged layers of coupling flows do (mlp.py): each phase writes
BM rows, a barrier follows, and the next phase reads them back from the caches.

    work    (·, WORK)         y [D], another D numbers, and what the context adds to the first layer: the state's type
    hidden  (·, ROW_STRIDE)   h₁, …, the layer of the context; in the backward then [context, y]: the products' operands
    slopes  (·, ROW_STRIDE)   their gradients before the activation, then those of the features' numbers

Units are sorted by what they see (`seen`, the fan-in), so that weights are triangular but for blocks: a chunk of units reads as
much of the layer before as its last unit sees, and the gradient of a chunk comes from the units behind the first that sees it.
So zeros are skipped by whole chunks, and a unit can be computed as soon as the features that it sees are known: every
function takes a range of units.
"""

import triton
import triton.language as tl

from glf_fast.kernels.autoregressive_packing import up
from glf_fast.kernels.math import activate, needs_input, slope_from_input, times_slope_from_output
from glf_fast.kernels.tiles import dot


@triton.jit
def known(seen, reached, N: tl.constexpr):
    """How many of a layer's N units see no more than the first `reached` of those before; the first unit that sees the next."""
    unit = tl.arange(0, triton.next_power_of_2(N))
    sees = tl.load(seen + unit, mask=unit < N, other=0)
    return tl.sum(((unit < N) & (sees <= reached)).to(tl.int32), 0)


@triton.jit
def reach(i: tl.constexpr, features, seen, HIDDEN: tl.constexpr, SEEN: tl.constexpr):
    """How many units of hidden layer i depend on no more than the first so many features; 0 for fewer than none."""
    found = features
    for j in tl.static_range(i + 1):
        found = known(seen + SEEN[j], found, HIDDEN[j])
    return tl.where(features < 0, 0, found)


@triton.jit
def sight(seen, end, N_IN: tl.constexpr):
    """How many of the N_IN units before the unit end − 1 sees."""
    return tl.minimum(tl.load(seen + end - 1), N_IN).to(tl.int32)


@triton.jit
def masked_product(
    acc, rows_of, row, live, ROW_STRIDE: tl.constexpr, weight, column, first, last, STRIDE_I: tl.constexpr,
    STRIDE_J: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, J] + a w[:, column] over the units first … last − 1 of rows a in memory; others may be of any value."""
    for start in range(first // BK * BK, last, BK):
        inner = start + tl.arange(0, BK)
        mask = live[:, None] & ((inner >= first) & (inner < last))[None, :]
        a = tl.load(rows_of + row[:, None] * ROW_STRIDE + inner[None, :], mask=mask, other=0.0)  # [BM, BK]
        w = tl.load(weight + inner[:, None] * STRIDE_I + column[None, :] * STRIDE_J)  # [BK, J]
        acc = dot(a, w, acc, PRECISION)
    return acc


@triton.jit
def map_rows(
    source, STRIDE: tl.constexpr, target, TO: tl.constexpr, row, live, matrix, offset, D: tl.constexpr,
    ADD: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Rows a of D numbers: a A, or a Aᵀ, with ADD plus the offset."""
    STRIDE_I: tl.constexpr = 1 if TRANSPOSED else up(D)
    STRIDE_J: tl.constexpr = up(D) if TRANSPOSED else 1
    for start in range(0, D, BN):
        column = start + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), STATE)
        acc = masked_product(acc, source, row, live, STRIDE, matrix, column, 0, D, STRIDE_I, STRIDE_J, BK, PRECISION)
        if ADD:
            acc += tl.load(offset + column)[None, :]
        tl.store(target + row[:, None] * TO + column[None, :], acc, mask=live[:, None] & (column < D)[None, :])


@triton.jit
def copy_rows(source, STRIDE: tl.constexpr, target, TO: tl.constexpr, row, live, N: tl.constexpr, CHUNK: tl.constexpr):
    """N numbers of each row."""
    for start in range(0, N, CHUNK):
        column = start + tl.arange(0, CHUNK)
        mask = live[:, None] & (column < N)[None, :]
        numbers = tl.load(source + row[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)
        tl.store(target + row[:, None] * TO + column[None, :], numbers.to(target.dtype.element_ty), mask=mask)


@triton.jit
def shift_rows(
    source, STRIDE: tl.constexpr, target, TO: tl.constexpr, row, live, offset, N: tl.constexpr, CHUNK: tl.constexpr
):
    """N numbers of each row, less an offset (N,)."""
    for start in range(0, N, CHUNK):
        column = start + tl.arange(0, CHUNK)
        mask = live[:, None] & (column < N)[None, :]
        numbers = tl.load(source + row[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)
        tl.store(target + row[:, None] * TO + column[None, :], numbers - tl.load(offset + column)[None, :], mask=mask)


@triton.jit
def keep_units(
    pre, hidden, slopes, row, ROW_STRIDE: tl.constexpr, column, mask, ACTIVATION: tl.constexpr, KEEP: tl.constexpr
):
    """a(pre) [BM, J], written to `hidden`; KEEP: also a'(pre), where its gradient will be, if a(pre) does not give it."""
    at = row[:, None] * ROW_STRIDE + column[None, :]
    h = activate(pre, ACTIVATION)
    tl.store(hidden + at, h.to(hidden.dtype.element_ty), mask=mask)
    if KEEP and needs_input(ACTIVATION):
        tl.store(slopes + at, slope_from_input(pre, ACTIVATION).to(slopes.dtype.element_ty), mask=mask)
    return h


@triton.jit
def add_context(
    context, work, hidden, slopes, row, live, weights, vectors, C: tl.constexpr, CONTEXT_LAYER: tl.constexpr,
    D: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr,
    WORK: tl.constexpr, ROW_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The context's addend to the first layer, into `work`; KEEP: its own layer also into `hidden`."""
    LAYERS: tl.constexpr = len(HIDDEN) + 1
    weight = weights + WEIGHTS[LAYERS]
    for start in range(0, HIDDEN[0], BN):
        column = start + tl.arange(0, BN)
        mask = live[:, None] & (column < HIDDEN[0])[None, :]
        acc = tl.zeros((BM, BN), STATE)
        acc = masked_product(acc, context, row, live, C, weight, column, 0, C, up(HIDDEN[0]), 1, BK, PRECISION)
        if CONTEXT_LAYER:
            acc += tl.load(vectors + VECTORS[LAYERS + 1] + column)[None, :]
            if KEEP:
                AT: tl.constexpr = COLUMNS[LAYERS - 1]
                acc = keep_units(acc, hidden + AT, slopes + AT, row, ROW_STRIDE, column, mask, ACTIVATION, True)
            else:
                acc = activate(acc, ACTIVATION)
        tl.store(work + 2 * D + row[:, None] * WORK + column[None, :], acc, mask=mask)


@triton.jit
def units(
    i: tl.constexpr, begin, end, work, hidden, slopes, row, live, weights, vectors, seen, D: tl.constexpr,
    C: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr,
    SEEN: tl.constexpr, WORK: tl.constexpr, ROW_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Units begin … end − 1 of hidden layer i, from the features in `work` or from the layer before."""
    WIDTH: tl.constexpr = up(HIDDEN[i])
    weight = weights + WEIGHTS[i]
    stop = tl.where(begin < end, end, 0)  # a chunk begins at a multiple of BN, which the compiler must see
    for start in range(begin // BN * BN, stop, BN):
        column = start + tl.arange(0, BN)
        mask = live[:, None] & ((column >= begin) & (column < end))[None, :]
        acc = tl.zeros((BM, BN), STATE)
        last = tl.minimum(start + BN, end)
        if i == 0:
            depth = sight(seen, last, D)
            acc = masked_product(acc, work, row, live, WORK, weight, column, 0, depth, WIDTH, 1, BK, PRECISION)
            if C > 0:
                acc += tl.load(work + 2 * D + row[:, None] * WORK + column[None, :], mask=mask, other=0.0)
        else:
            depth = sight(seen + SEEN[i], last, HIDDEN[i - 1])
            before = hidden + COLUMNS[i - 1]
            acc = masked_product(acc, before, row, live, ROW_STRIDE, weight, column, 0, depth, WIDTH, 1, BK, PRECISION)
        acc += tl.load(vectors + VECTORS[i + 1] + column)[None, :]
        AT: tl.constexpr = COLUMNS[i]
        keep_units(acc, hidden + AT, slopes + AT, row, ROW_STRIDE, column, mask, ACTIVATION, KEEP)


@triton.jit
def times_slopes(
    grad, AT: tl.constexpr, hidden, slopes, row, ROW_STRIDE: tl.constexpr, column, mask, ACTIVATION: tl.constexpr
):
    """∂pre = ∂h·a'(pre) [BM, J] of some units of the layer that starts at AT, written to `slopes`."""
    at = AT + row[:, None] * ROW_STRIDE + column[None, :]
    if needs_input(ACTIVATION):
        grad *= tl.load(slopes + at, mask=mask, other=0.0).to(grad.dtype)
    else:
        grad = times_slope_from_output(grad, tl.load(hidden + at, mask=mask, other=0.0).to(grad.dtype), ACTIVATION)
    tl.store(slopes + at, grad.to(slopes.dtype.element_ty), mask=mask)


@triton.jit
def units_backward(
    i: tl.constexpr, begin, end, hidden, slopes, row, live, weights, seen, D: tl.constexpr, HIDDEN: tl.constexpr,
    NUMBERS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, SEEN: tl.constexpr, ROW_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """The gradients of units begin … end − 1 of hidden layer i before their activation, from what sees them."""
    weight = weights + WEIGHTS[i + 1]
    after = seen + SEEN[i + 1]
    stop = tl.where(begin < end, end, 0)
    for start in range(begin // BN * BN, stop, BN):
        column = start + tl.arange(0, BN)
        mask = live[:, None] & ((column >= begin) & (column < end))[None, :]
        acc = tl.zeros((BM, BN), STATE)
        least = tl.maximum(start, begin)
        if i == len(HIDDEN) - 1:
            first = known(after, least, D) * NUMBERS
            OUT: tl.constexpr = up(up(D, 16) * NUMBERS)
            behind = slopes + COLUMNS[len(COLUMNS) - 1]
            acc = masked_product(
                acc, behind, row, live, ROW_STRIDE, weight, column, first, D * NUMBERS, 1, OUT, BK, PRECISION
            )
        else:
            first = known(after, least, HIDDEN[i + 1])
            behind = slopes + COLUMNS[i + 1]
            acc = masked_product(
                acc, behind, row, live, ROW_STRIDE, weight, column, first, HIDDEN[i + 1], 1, up(HIDDEN[i + 1]), BK, PRECISION
            )  # fmt: skip
        times_slopes(acc, COLUMNS[i], hidden, slopes, row, ROW_STRIDE, column, mask, ACTIVATION)


@triton.jit
def of_network(
    begin, end, source, STRIDE: tl.constexpr, target, TO: tl.constexpr, slopes, row, live, weights, seen,
    D: tl.constexpr, HIDDEN: tl.constexpr, ROW_STRIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Gradients of features begin … end − 1 from `source`, and those that come back through the network, to `target`."""
    for start in range(begin // BN * BN, end, BN):
        column = start + tl.arange(0, BN)
        mask = live[:, None] & ((column >= begin) & (column < end))[None, :]
        first = known(seen, tl.maximum(start, begin), HIDDEN[0])
        acc = tl.zeros((BM, BN), STATE)
        acc = masked_product(
            acc, slopes, row, live, ROW_STRIDE, weights, column, first, HIDDEN[0], 1, up(HIDDEN[0]), BK, PRECISION
        )
        acc += tl.load(source + row[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)
        tl.store(target + row[:, None] * TO + column[None, :], acc, mask=mask)


@triton.jit
def context_layer_backward(
    hidden, slopes, row, live, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROW_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, BN: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The gradient of the context's own layer before its activation: what it adds has that of the first layer."""
    for start in range(0, HIDDEN[0], BN):
        column = start + tl.arange(0, BN)
        mask = live[:, None] & (column < HIDDEN[0])[None, :]
        grad = tl.load(slopes + row[:, None] * ROW_STRIDE + column[None, :], mask=mask, other=0.0).to(STATE)
        times_slopes(grad, COLUMNS[len(HIDDEN)], hidden, slopes, row, ROW_STRIDE, column, mask, ACTIVATION)
