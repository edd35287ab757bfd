"""The MLP of one step, (u, t) = MLP([p, context]), and its backward, on row tiles.

HIDDEN are the widths of its 1 to 4 hidden layers; weight i is (K, nᵢ, nᵢ₊₁), of which `step` is the one in question.

Two hidden layers chain like attention: h₁ stays in registers, and a loop over chunks of h₂ computes BN columns, activates
them and multiplies them into the running (u, t): nothing touches memory. Triton cannot join tiles, so a hidden layer that is
itself computed in chunks (the inner ones of three and four layers; the first one where it is too wide for registers, STAGED)
passes through memory: each program writes its own BM rows of `hidden` and reads them back after a barrier. They are BM·H
numbers, 16 KB in bf16 at BM 32, H 256: they stay in the L1 and L2 caches, like the weights that stream beside them.

The backward needs every hidden layer in memory anyway (the weight gradients are made from it), so there all are staged.
Layer i occupies the columns COLUMNS[i] … of the rows of `hidden`, and its gradient the same columns of `slopes`.
"""

import triton
import triton.language as tl

from glf_fast.kernels.math import activate, slope_from_input, times_slope_from_output
from glf_fast.kernels.tiles import dot, keep_columns, load_block, product, store_tile


@triton.jit
def load_bias(bias, column, N: tl.constexpr, BM: tl.constexpr):
    """The bias (N,) at some columns, in every row [BM, J]: where a sum of products starts."""
    b = tl.load(bias + column, mask=column < N, other=0.0)
    return tl.zeros((BM, column.shape[0]), b.dtype) + b[None, :]


@triton.jit
def first_layer(
    p, context, row, live, weight, bias, column, P: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[p, context] w + b at some columns [BM, J], from p in registers and the context (·, C) in memory."""
    BM: tl.constexpr = p.shape[0]
    HALF: tl.constexpr = p.shape[1]
    acc = load_bias(bias, column, N, BM)
    acc = dot(p, load_block(weight, tl.arange(0, HALF), column, P, N, N, 1), acc, PRECISION)
    if C > 0:
        acc = product(acc, context, row, live, C, weight + P * N, column, C, N, N, 1, BK, PRECISION)
    return acc


@triton.jit
def inner_layer(
    hidden, row, live, ROW_STRIDE: tl.constexpr, weight, bias, column, N_IN: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h w + b at some columns [BM, J], from the rows h in memory."""
    acc = load_bias(bias, column, N, BM)
    return product(acc, hidden, row, live, ROW_STRIDE, weight, column, N_IN, N, N, 1, BK, PRECISION)


@triton.jit
def keep_hidden(
    pre, hidden, slopes, row, live, ROW_STRIDE: tl.constexpr, column, N: tl.constexpr, ACTIVATION: tl.constexpr,
    SLOPES: tl.constexpr,
):  # fmt: skip
    """a(pre) [BM, J], written to `hidden`; with SLOPES also a'(pre), where its gradient will be."""
    h = activate(pre, ACTIVATION)
    store_tile(hidden, h, row, live, ROW_STRIDE, column, N)
    if SLOPES and (ACTIVATION == "silu" or ACTIVATION == "gelu"):
        store_tile(slopes, slope_from_input(pre, ACTIVATION), row, live, ROW_STRIDE, column, N)
    return h


@triton.jit
def mlp(
    p, context, weights, biases, hidden, slopes, row, live, step, D: tl.constexpr, C: tl.constexpr,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROW_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    STAGED: tl.constexpr, KEEP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u and t [BM, HALF]. STAGED: hidden layers pass through memory; KEEP: all of them and their slopes stay there."""
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    BM: tl.constexpr = p.shape[0]
    HALF: tl.constexpr = p.shape[1]
    LAST: tl.constexpr = len(HIDDEN) - 1
    N: tl.constexpr = HIDDEN[LAST]
    half = tl.arange(0, HALF)

    if STAGED:
        tl.debug_barrier()  # the last step's rows have been read
        for i in tl.static_range(LAST):
            b = biases[i] + step * HIDDEN[i]
            for start in range(0, HIDDEN[i], BN):
                column = start + tl.arange(0, BN)
                if i == 0:
                    w = weights[0] + step * ((P + C) * HIDDEN[0])
                    pre = first_layer(p, context, row, live, w, b, column, P, C, HIDDEN[0], BK, PRECISION)  # [BM, BN]
                else:
                    w = weights[i] + step * (HIDDEN[i - 1] * HIDDEN[i])
                    pre = inner_layer(
                        hidden + COLUMNS[i - 1], row, live, ROW_STRIDE, w, b, column, HIDDEN[i - 1], HIDDEN[i], BM, BK,
                        PRECISION,
                    )  # fmt: skip
                at = COLUMNS[i]
                keep_hidden(pre, hidden + at, slopes + at, row, live, ROW_STRIDE, column, HIDDEN[i], ACTIVATION, KEEP)
            tl.debug_barrier()  # layer i is complete
    elif LAST == 1:
        WIDTH: tl.constexpr = triton.next_power_of_2(HIDDEN[0]) if HIDDEN[0] > 16 else 16
        whole = tl.arange(0, WIDTH)
        w = weights[0] + step * ((P + C) * HIDDEN[0])
        b = biases[0] + step * HIDDEN[0]
        h = activate(first_layer(p, context, row, live, w, b, whole, P, C, HIDDEN[0], BK, PRECISION), ACTIVATION)
        h = keep_columns(h, whole, HIDDEN[0])  # [BM, WIDTH]
        if PRECISION == "bf16":
            h = h.to(tl.bfloat16)  # all that its products use; half the registers

    u = load_bias(biases[LAST + 1] + step * (2 * T), half, T, BM)
    t = load_bias(biases[LAST + 1] + step * (2 * T) + T, half, T, BM)
    w_out = weights[LAST + 1] + step * (N * 2 * T)
    b = biases[LAST] + step * N
    for start in range(0, N, BN):
        column = start + tl.arange(0, BN)
        if LAST == 0:
            w = weights[0] + step * ((P + C) * N)
            pre = first_layer(p, context, row, live, w, b, column, P, C, N, BK, PRECISION)  # [BM, BN]
        elif STAGED:
            w = weights[LAST] + step * (HIDDEN[LAST - 1] * N)
            pre = inner_layer(
                hidden + COLUMNS[LAST - 1], row, live, ROW_STRIDE, w, b, column, HIDDEN[LAST - 1], N, BM, BK,
                PRECISION,
            )  # fmt: skip
        else:
            w = weights[1] + step * (HIDDEN[0] * N)
            pre = load_bias(b, column, N, BM)
            pre = dot(h, load_block(w, whole, column, HIDDEN[0], N, N, 1), pre, PRECISION)  # [BM, BN]
        if KEEP:
            a = keep_hidden(
                pre, hidden + COLUMNS[LAST], slopes + COLUMNS[LAST], row, live, ROW_STRIDE, column, N, ACTIVATION, True
            )
        else:
            a = activate(pre, ACTIVATION)
        a = keep_columns(a, column, N)  # [BM, BN]
        u = dot(a, load_block(w_out, column, half, N, T, 2 * T, 1), u, PRECISION)
        t = dot(a, load_block(w_out + T, column, half, N, T, 2 * T, 1), t, PRECISION)
    return keep_columns(u, half, T), keep_columns(t, half, T)


@triton.jit
def times_slope(grad, hidden, slopes, row, live, ROW_STRIDE: tl.constexpr, column, N: tl.constexpr,
                ACTIVATION: tl.constexpr):  # fmt: skip
    """∂pre = ∂h·a'(pre) [BM, J] of one chunk of a layer, written to `slopes`."""
    at = row[:, None] * ROW_STRIDE + column[None, :]
    mask = live[:, None] & (column < N)[None, :]
    if ACTIVATION == "silu" or ACTIVATION == "gelu":
        grad = grad * tl.load(slopes + at, mask=mask, other=0.0).to(grad.dtype)
    else:
        grad = times_slope_from_output(grad, tl.load(hidden + at, mask=mask, other=0.0).to(grad.dtype), ACTIVATION)
    store_tile(slopes, grad, row, live, ROW_STRIDE, column, N)


@triton.jit
def mlp_backward(
    grad_u, grad_t, weights, hidden, slopes, row, live, step, D: tl.constexpr, C: tl.constexpr,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROW_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂p [BM, HALF]. Turns `slopes` into the gradients of the hidden layers before their activation."""
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    BM: tl.constexpr = grad_u.shape[0]
    HALF: tl.constexpr = grad_u.shape[1]
    LAST: tl.constexpr = len(HIDDEN) - 1
    N: tl.constexpr = HIDDEN[LAST]
    half = tl.arange(0, HALF)

    tl.debug_barrier()  # the hidden layers and slopes are complete
    w_out = weights[LAST + 1] + step * (N * 2 * T)
    for start in range(0, N, BN):
        column = start + tl.arange(0, BN)
        grad = tl.zeros((BM, BN), grad_u.dtype)
        grad = dot(grad_u, load_block(w_out, half, column, T, N, 1, 2 * T), grad, PRECISION)  # [BM, BN]
        grad = dot(grad_t, load_block(w_out + T, half, column, T, N, 1, 2 * T), grad, PRECISION)
        at = COLUMNS[LAST]
        times_slope(grad, hidden + at, slopes + at, row, live, ROW_STRIDE, column, N, ACTIVATION)
    for i in tl.static_range(LAST - 1, -1, -1):
        tl.debug_barrier()  # the gradient of layer i + 1 is complete
        w = weights[i + 1] + step * (HIDDEN[i] * HIDDEN[i + 1])
        for start in range(0, HIDDEN[i], BN):
            column = start + tl.arange(0, BN)
            grad = product(
                tl.zeros((BM, BN), grad_u.dtype), slopes + COLUMNS[i + 1], row, live, ROW_STRIDE, w, column,
                HIDDEN[i + 1], HIDDEN[i], 1, HIDDEN[i + 1], BK, PRECISION,
            )  # fmt: skip
            at = COLUMNS[i]
            times_slope(grad, hidden + at, slopes + at, row, live, ROW_STRIDE, column, HIDDEN[i], ACTIVATION)
    tl.debug_barrier()
    w = weights[0] + step * ((P + C) * HIDDEN[0])
    grad_p = product(
        tl.zeros((BM, HALF), grad_u.dtype), slopes + COLUMNS[0], row, live, ROW_STRIDE, w, half,
        HIDDEN[0], P, 1, HIDDEN[0], BK, PRECISION,
    )  # fmt: skip
    return keep_columns(grad_p, half, P)
