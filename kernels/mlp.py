"""The MLP of one step, (u, t) = MLP([p, context]), and its backward, on row tiles.

HIDDEN are the widths of its 1 to 4 hidden layers; `weights` and `vectors` are the step's packed parameters (packing.py), of
which layer i's begin at WEIGHTS[i] and VECTORS[i + 1].

Two hidden layers chain like attention: h₁ stays in registers, and a loop over chunks of h₂ computes BN columns, activates
them and multiplies them into the running (u, t): nothing touches memory. Triton cannot join tiles, so a hidden layer that is
itself computed in chunks (the inner ones of three and four layers; the first one where it is too wide for registers, STAGED)
passes through memory: each program writes its own BM rows of `hidden` and reads them back after a barrier. They are BM·H
numbers, 16 KB in bf16 at BM 32, H 256: they stay in the L1 and L2 caches, like the weights that stream beside them.

The backward needs every hidden layer in memory anyway (the weight gradients are made from it), so there all are staged.
Layer i occupies the columns COLUMNS[i] … COLUMNS[i + 1] of the rows of `hidden`, zeros behind its HIDDEN[i] numbers, and its
gradient the same columns of `slopes`: whoever reads a chunk finds all of it written.
"""

import triton
import triton.language as tl

from glf_fast.kernels.math import activate, needs_input, slope_from_input, times_slope_from_output
from glf_fast.kernels.tiles import divides, dot, keep_columns, load_bias, load_weight, product, store_tile


@triton.jit
def load_first(weights, D: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, STAGED: tl.constexpr):
    """Rows of p of the first of two hidden layers [HALF, WIDTH], which `mlp` keeps whole; where it does not, `weights`.

    Asked for before the affine map, so that it arrives while that is multiplied.
    """
    if len(HIDDEN) == 2 and not STAGED:
        HALF: tl.constexpr = triton.next_power_of_2(D - D // 2) if D - D // 2 > 16 else 16
        WIDTH: tl.constexpr = triton.next_power_of_2(COLUMNS[1])
        return load_weight(weights, tl.arange(0, HALF), tl.arange(0, WIDTH), HALF, COLUMNS[1], COLUMNS[1], 1)
    else:
        return weights


@triton.jit
def first_layer(
    p, context, row, live, weight, bias, column, C: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[p, context] w + b at some columns [BM, J], from p in registers and the context (·, C) in memory."""
    BM: tl.constexpr = p.shape[0]
    HALF: tl.constexpr = p.shape[1]
    acc = tl.zeros((BM, column.shape[0]), p.dtype)
    acc = dot(p, load_weight(weight, tl.arange(0, HALF), column, HALF, N, N, 1), acc, PRECISION)
    return of_context(acc, context, row, live, weight, column, HALF, C, N, BK, PRECISION) + load_bias(bias, column, N)


@triton.jit
def of_context(
    acc, context, row, live, weight, column, HALF: tl.constexpr, C: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + context w at some columns [BM, J]: the rows of the first layer's weight behind those of p."""
    if C > 0:
        ROWS: tl.constexpr = (C + 15) // 16 * 16
        w = weight + HALF * N
        return product(acc, context, row, live, C, w, column, C, ROWS, N, N, 1, BK, PRECISION)
    else:
        return acc


@triton.jit
def inner_layer(
    hidden, row, live, ROW_STRIDE: tl.constexpr, weight, bias, column, N_IN: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """h w + b at some columns [BM, J], from the rows h in memory."""
    acc = tl.zeros((BM, column.shape[0]), STATE)
    acc = product(acc, hidden, row, live, ROW_STRIDE, weight, column, N_IN, N_IN, N, N, 1, BK, PRECISION)
    return acc + load_bias(bias, column, N)


@triton.jit
def keep_hidden(
    pre, hidden, slopes, row, live, ROW_STRIDE: tl.constexpr, column, N: tl.constexpr, PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """a(pre) [BM, J], written to `hidden`; with SLOPES also a'(pre), where its gradient will be."""
    h = keep_columns(activate(pre, ACTIVATION), column, N)
    store_tile(hidden, h, row, live, ROW_STRIDE, column, PADDED)
    if SLOPES and needs_input(ACTIVATION):
        store_tile(slopes, slope_from_input(pre, ACTIVATION), row, live, ROW_STRIDE, column, PADDED)
    return h


@triton.jit
def staged_layer(
    i: tl.constexpr, p, context, w, b, hidden, slopes, row, live, C: tl.constexpr, HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr, ROW_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The hidden layer i, BN columns at a time, from p or from the rows of the layer before it, into memory."""
    BM: tl.constexpr = p.shape[0]
    AT: tl.constexpr = COLUMNS[i]
    PADDED: tl.constexpr = COLUMNS[i + 1] - COLUMNS[i]
    for start in range(0, PADDED, BN):
        column = start + tl.arange(0, BN)
        if i == 0:
            pre = first_layer(p, context, row, live, w, b, column, C, PADDED, BK, PRECISION)  # [BM, BN]
        else:
            BEFORE: tl.constexpr = COLUMNS[i - 1]
            pre = inner_layer(
                hidden + BEFORE, row, live, ROW_STRIDE, w, b, column, AT - BEFORE, PADDED, BM, BK, PRECISION, p.dtype
            )
        keep_hidden(pre, hidden + AT, slopes + AT, row, live, ROW_STRIDE, column, HIDDEN[i], PADDED, ACTIVATION, KEEP)


@triton.jit
def hidden_layers(
    p, context, weights, vectors, hidden, slopes, row, live, C: tl.constexpr, HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr, ROW_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, COUNT: tl.constexpr, KEEP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the first COUNT hidden layers to memory. When it returns, they are complete."""
    tl.debug_barrier()  # the last step's rows have been read
    for i in tl.static_range(COUNT):
        staged_layer(
            i, p, context, weights + WEIGHTS[i], vectors + VECTORS[i + 1], hidden, slopes, row, live, C, HIDDEN, COLUMNS,
            ROW_STRIDE, ACTIVATION, KEEP, BN, BK, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # layer i is complete


@triton.jit
def mlp(
    p, w_first, context, weights, vectors, hidden, slopes, row, live, D: tl.constexpr, C: tl.constexpr,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr,
    ROW_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, STAGED: tl.constexpr, KEEP: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u and t [BM, HALF]. STAGED: hidden layers pass through memory; KEEP: all of them and their slopes stay there."""
    T: tl.constexpr = D // 2
    BM: tl.constexpr = p.shape[0]
    HALF: tl.constexpr = p.shape[1]
    LAST: tl.constexpr = len(HIDDEN) - 1
    N: tl.constexpr = HIDDEN[LAST]
    N_PADDED: tl.constexpr = COLUMNS[LAST + 1] - COLUMNS[LAST]
    half = tl.arange(0, HALF)

    if STAGED:
        hidden_layers(
            p, context, weights, vectors, hidden, slopes, row, live, C, HIDDEN, COLUMNS, WEIGHTS, VECTORS, ROW_STRIDE,
            ACTIVATION, LAST, KEEP, BN, BK, PRECISION,
        )  # fmt: skip
    elif LAST == 1:
        WIDTH: tl.constexpr = triton.next_power_of_2(COLUMNS[1])
        whole = tl.arange(0, WIDTH)
        h = dot(p, w_first, tl.zeros((BM, WIDTH), p.dtype), PRECISION)
        h = of_context(h, context, row, live, weights, whole, HALF, C, COLUMNS[1], BK, PRECISION)
        h = activate(h + load_bias(vectors + VECTORS[1], whole, COLUMNS[1]), ACTIVATION)
        h = keep_columns(h, whole, HIDDEN[0])  # [BM, WIDTH]
        if PRECISION == "bf16":
            h = h.to(tl.bfloat16)  # all that its products use; half the registers

    u = tl.zeros((BM, HALF), p.dtype)
    t = tl.zeros((BM, HALF), p.dtype)
    w = weights + WEIGHTS[LAST]
    w_out = weights + WEIGHTS[LAST + 1]
    b = vectors + VECTORS[LAST + 1]
    b_out = vectors + VECTORS[LAST + 2]
    for start in range(0, N_PADDED, BN):
        column = start + tl.arange(0, BN)
        if LAST == 0:
            pre = first_layer(p, context, row, live, w, b, column, C, N_PADDED, BK, PRECISION)  # [BM, BN]
        elif STAGED:
            pre = inner_layer(
                hidden + COLUMNS[LAST - 1], row, live, ROW_STRIDE, w, b, column, COLUMNS[LAST] - COLUMNS[LAST - 1],
                N_PADDED, BM, BK, PRECISION, p.dtype,
            )  # fmt: skip
        else:
            w_chunk = load_weight(w, whole, column, COLUMNS[1], N_PADDED, N_PADDED, 1)
            pre = dot(h, w_chunk, tl.zeros((BM, BN), p.dtype), PRECISION) + load_bias(b, column, N_PADDED)  # [BM, BN]
        if KEEP:
            a = keep_hidden(
                pre, hidden + COLUMNS[LAST], slopes + COLUMNS[LAST], row, live, ROW_STRIDE, column, N, N_PADDED,
                ACTIVATION, True,
            )  # fmt: skip
        else:
            a = keep_columns(activate(pre, ACTIVATION), column, N)  # [BM, BN]
        u = dot(a, load_weight(w_out, column, half, N_PADDED, HALF, 2 * HALF, 1), u, PRECISION)
        t = dot(a, load_weight(w_out + HALF, column, half, N_PADDED, HALF, 2 * HALF, 1), t, PRECISION)
    u += load_bias(b_out, half, HALF)
    t += load_bias(b_out + HALF, half, HALF)
    return keep_columns(u, half, T), keep_columns(t, half, T)


@triton.jit
def times_slope(
    grad, hidden, slopes, row, live, ROW_STRIDE: tl.constexpr, column, N: tl.constexpr, PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """∂pre = ∂h·a'(pre) [BM, J] of one chunk of a layer, written to `slopes`."""
    at = row[:, None] * ROW_STRIDE + column[None, :]
    mask = live[:, None]
    if not divides(column.shape[0], PADDED):
        mask = mask & (column < PADDED)[None, :]
    if needs_input(ACTIVATION):
        grad = grad * tl.load(slopes + at, mask=mask, other=0.0).to(grad.dtype)
    else:
        grad = times_slope_from_output(grad, tl.load(hidden + at, mask=mask, other=0.0).to(grad.dtype), ACTIVATION)
    store_tile(slopes, keep_columns(grad, column, N), row, live, ROW_STRIDE, column, PADDED)


@triton.jit
def layer_backward(
    i: tl.constexpr, w, hidden, slopes, row, live, STATE: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the hidden layer i before its activation, from that of layer i + 1, through memory."""
    AT: tl.constexpr = COLUMNS[i]
    BEHIND: tl.constexpr = COLUMNS[i + 1]
    PADDED: tl.constexpr = BEHIND - AT
    NEXT: tl.constexpr = COLUMNS[i + 2] - BEHIND
    for start in range(0, PADDED, BN):
        column = start + tl.arange(0, BN)
        grad = tl.zeros((BM, BN), STATE)
        grad = product(
            grad, slopes + BEHIND, row, live, ROW_STRIDE, w, column, NEXT, NEXT, PADDED, 1, NEXT, BK, PRECISION
        )
        times_slope(grad, hidden + AT, slopes + AT, row, live, ROW_STRIDE, column, HIDDEN[i], PADDED, ACTIVATION)


@triton.jit
def mlp_backward(
    grad_u, grad_t, weights, hidden, slopes, row, live, D: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTS: tl.constexpr, ROW_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """∂p [BM, HALF]. Turns `slopes` into the gradients of the hidden layers before their activation."""
    BM: tl.constexpr = grad_u.shape[0]
    HALF: tl.constexpr = grad_u.shape[1]
    LAST: tl.constexpr = len(HIDDEN) - 1
    N_PADDED: tl.constexpr = COLUMNS[LAST + 1] - COLUMNS[LAST]
    half = tl.arange(0, HALF)

    tl.debug_barrier()  # the hidden layers and slopes are complete
    w_out = weights + WEIGHTS[LAST + 1]
    for start in range(0, N_PADDED, BN):
        column = start + tl.arange(0, BN)
        grad = tl.zeros((BM, BN), grad_u.dtype)
        grad = dot(grad_u, load_weight(w_out, half, column, HALF, N_PADDED, 1, 2 * HALF), grad, PRECISION)  # [BM, BN]
        grad = dot(grad_t, load_weight(w_out + HALF, half, column, HALF, N_PADDED, 1, 2 * HALF), grad, PRECISION)
        at = COLUMNS[LAST]
        times_slope(grad, hidden + at, slopes + at, row, live, ROW_STRIDE, column, HIDDEN[LAST], N_PADDED, ACTIVATION)
    return hidden_layers_backward(
        weights, hidden, slopes, row, live, D, grad_u.dtype, HIDDEN, COLUMNS, WEIGHTS, ROW_STRIDE, ACTIVATION, BM, HALF, BN,
        BK, PRECISION,
    )  # fmt: skip


@triton.jit
def mlp_backward_of_memory(
    weights, hidden, slopes, row, live, D: tl.constexpr, STATE: tl.constexpr, HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, N_RAW: tl.constexpr, ROW_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """∂p [BM, HALF], as `mlp_backward`, where the gradients of the last layer's N_RAW numbers stand in `slopes`.

    They follow those of the hidden layers. W_out is packed a second time for them, [⌈n⌉, ⌈N_RAW⌉], behind all other weights.
    """
    LAST: tl.constexpr = len(HIDDEN) - 1
    AT: tl.constexpr = COLUMNS[LAST]
    RAW: tl.constexpr = COLUMNS[LAST + 1]
    PADDED: tl.constexpr = RAW - AT
    STRIDE: tl.constexpr = (N_RAW + 15) // 16 * 16
    tl.debug_barrier()  # the hidden layers and slopes are complete
    w_out = weights + WEIGHTS[LAST + 2]
    for start in range(0, PADDED, BN):
        column = start + tl.arange(0, BN)
        grad = tl.zeros((BM, BN), STATE)
        grad = product(
            grad, slopes + RAW, row, live, ROW_STRIDE, w_out, column, N_RAW, STRIDE, PADDED, 1, STRIDE, BK, PRECISION
        )
        times_slope(grad, hidden + AT, slopes + AT, row, live, ROW_STRIDE, column, HIDDEN[LAST], PADDED, ACTIVATION)
    return hidden_layers_backward(
        weights, hidden, slopes, row, live, D, STATE, HIDDEN, COLUMNS, WEIGHTS, ROW_STRIDE, ACTIVATION, BM, HALF, BN, BK,
        PRECISION,
    )  # fmt: skip


@triton.jit
def hidden_layers_backward(
    weights, hidden, slopes, row, live, D: tl.constexpr, STATE: tl.constexpr, HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, ROW_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂p [BM, HALF]. Writes the gradients of all hidden layers but the last one, which stand in `slopes` already."""
    P: tl.constexpr = D - D // 2
    LAST: tl.constexpr = len(HIDDEN) - 1
    half = tl.arange(0, HALF)
    for i in tl.static_range(LAST - 1, -1, -1):
        tl.debug_barrier()  # the gradient of layer i + 1 is complete
        layer_backward(
            i, weights + WEIGHTS[i + 1], hidden, slopes, row, live, STATE, HIDDEN, COLUMNS, ROW_STRIDE, ACTIVATION, BM,
            BN, BK, PRECISION,
        )  # fmt: skip
    tl.debug_barrier()
    FIRST: tl.constexpr = COLUMNS[1]
    grad_p = product(
        tl.zeros((BM, HALF), STATE), slopes, row, live, ROW_STRIDE, weights, half, FIRST, FIRST, HALF, 1, FIRST, BK,
        PRECISION,
    )  # fmt: skip
    return keep_columns(grad_p, half, P)
