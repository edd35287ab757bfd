"""What the kernels of the whole flow are made of: row tiles in and out of memory, their products, the affine map.

A program owns BM rows. Its state is two register tiles p and v [BM, HALF], HALF ≥ 16 the power of two that holds
P = D − D//2 columns; columns beyond P (of v: beyond T = D//2) are zero. Pointers to rows start at the program's first
one; `row` [BM] counts from there, `live` [BM] says which rows exist.

Padded columns are set to zero after every product, although their weights are zero: a row with an infinity would have
∞·0 = NaN there and carry it into sums which are finite.
"""

import triton
import triton.language as tl

# The interpreter has no inline assembly, and computes "tf32" products exactly.
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def round_tf32(tile):
    """Rounded to tf32's 10 bits: matrix units ignore the other 13, and so truncate. NaN and infinities stay what they are.

    Truncation is biased, and the steps of a flow add it up: 6 to 10 times the error of rounding after three steps. Triton
    leaves it at that: no cvt in the PTX of a "tf32" product, for mma.sync, wgmma or tcgen05, in 3.6 and 3.9 ("tf32x3" rounds
    its high parts). Rounding costs two instructions a number, a comparison and an addition, and weights are rounded by
    every program: at D 64, H 256, BM 16 a thread's step grows from 2,900 instructions to 4,400, while its multiprocessor
    needs 5,900 clocks to read the step's 376 KB at 64 bytes a clock. Rounding them once, before, would be one more launch.
    """
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [tile], tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; "bf16" and "tf32" round the operands, never the accumulator."""
    if COMPILED and PRECISION == "tf32":
        a = round_tf32(a)
        b = round_tf32(b)
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_block(matrix, i, j, N_I: tl.constexpr, N_J: tl.constexpr, STRIDE_I: tl.constexpr, STRIDE_J: tl.constexpr):
    """matrix[i, j] [I, J], zero where i ≥ N_I or j ≥ N_J; swapped strides give the transpose."""
    mask = (i < N_I)[:, None] & (j < N_J)[None, :]
    return tl.load(matrix + i[:, None] * STRIDE_I + j[None, :] * STRIDE_J, mask=mask, other=0.0)


@triton.jit
def load_halves(rows_of, row, live, D: tl.constexpr, HALF: tl.constexpr):
    """p and v [BM, HALF] of rows of D numbers; zero in dead rows and padded columns."""
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    half = tl.arange(0, HALF)
    at = rows_of + row[:, None] * D + half[None, :]
    p = tl.load(at, mask=live[:, None] & (half < P)[None, :], other=0.0)
    v = tl.load(at + P, mask=live[:, None] & (half < T)[None, :], other=0.0)
    return p, v


@triton.jit
def store_halves(rows_of, p, v, row, live, D: tl.constexpr, HALF: tl.constexpr):
    """The inverse of `load_halves`."""
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    half = tl.arange(0, HALF)
    at = rows_of + row[:, None] * D + half[None, :]
    tl.store(at, p, mask=live[:, None] & (half < P)[None, :])
    tl.store(at + P, v, mask=live[:, None] & (half < T)[None, :])


@triton.jit
def store_tile(rows_of, tile, row, live, ROW_STRIDE: tl.constexpr, column, N: tl.constexpr):
    """Columns < N of a tile [BM, J] into rows of ROW_STRIDE numbers, in their dtype."""
    at = rows_of + row[:, None] * ROW_STRIDE + column[None, :]
    tl.store(at, tile.to(rows_of.dtype.element_ty), mask=live[:, None] & (column < N)[None, :])


@triton.jit
def keep_columns(tile, column, N: tl.constexpr):
    """Zero in the columns ≥ N of a tile [BM, ·]."""
    return tl.where((column < N)[None, :], tile, 0.0)


@triton.jit
def load_offset(offset, D: tl.constexpr, HALF: tl.constexpr):
    """The offset c (D,) as two rows [1, HALF]."""
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    half = tl.arange(0, HALF)
    c_p = tl.load(offset + half, mask=half < P, other=0.0)
    c_v = tl.load(offset + P + half, mask=half < T, other=0.0)
    return c_p[None, :], c_v[None, :]


@triton.jit
def product(
    acc, rows_of, row, live, ROW_STRIDE: tl.constexpr, weight, column, N_IN: tl.constexpr, N_OUT: tl.constexpr,
    STRIDE_I: tl.constexpr, STRIDE_J: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, J] + a w[:, column], with the rows a (·, N_IN) in memory, BK columns at a time."""
    for start in range(0, N_IN, BK):
        inner = start + tl.arange(0, BK)
        mask = live[:, None] & (inner < N_IN)[None, :]
        a = tl.load(rows_of + row[:, None] * ROW_STRIDE + inner[None, :], mask=mask, other=0.0)  # [BM, BK]
        w = load_block(weight, inner, column, N_IN, N_OUT, STRIDE_I, STRIDE_J)  # [BK, J]
        acc = dot(a, w, acc, PRECISION)
    return acc


@triton.jit
def affine(
    p, v, scratch, row, live, matrix, D: tl.constexpr, HALF: tl.constexpr, TRANSPOSED: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[p, v] A, or [p, v] Aᵀ, with the (D, D) matrix as four blocks: no tile is ever split or joined.

    Blocks of more than 32 columns do not fit into registers: at D 256 in full precision 1,900 bytes were spilled. There
    the rows [p, v] pass through `scratch` (·, D), as staged hidden layers do, and the matrix is read BK rows at a time.
    """
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    I: tl.constexpr = 1 if TRANSPOSED else D  # noqa: E741
    J: tl.constexpr = D if TRANSPOSED else 1
    half = tl.arange(0, HALF)
    zero = tl.zeros_like(p)
    if HALF > 32:
        store_halves(scratch, p, v, row, live, D, HALF)
        tl.debug_barrier()
        y_p = product(zero, scratch, row, live, D, matrix, half, D, P, I, J, BK, PRECISION)  # [BM, HALF]
        y_v = product(zero, scratch, row, live, D, matrix + P * J, half, D, T, I, J, BK, PRECISION)
        tl.debug_barrier()  # whoever writes there next waits until all is read
    else:
        y_p = dot(p, load_block(matrix, half, half, P, P, I, J), zero, PRECISION)  # [BM, HALF]
        y_p = dot(v, load_block(matrix + P * I, half, half, T, P, I, J), y_p, PRECISION)
        y_v = dot(p, load_block(matrix + P * J, half, half, P, T, I, J), zero, PRECISION)
        y_v = dot(v, load_block(matrix + P * I + P * J, half, half, T, T, I, J), y_v, PRECISION)
    return keep_columns(y_p, half, P), keep_columns(y_v, half, T)
