"""What the kernels of the whole flow are made of: row tiles in and out of memory, their products, the affine map.

A program owns BM rows. Its state is two register tiles p and v [BM, HALF], HALF ≥ 16 the power of two that holds
P = D − D//2 columns; columns beyond P (of v: beyond T = D//2) are zero. Pointers to rows start at the program's first
one; `row` [BM] counts from there, `live` [BM] says which rows exist.

Padded columns are set to zero after every product, although their weights are zero: a row with an infinity would have
∞·0 = NaN there and carry it into sums which are finite.

Weights come packed (packing.py): padded with zeros to multiples of 16, and rounded. A tile that divides them needs no mask.
"""

import triton
import triton.language as tl

# The interpreter has no inline assembly, and computes "tf32" products exactly.
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.constexpr_function
def divides(chunk, n):
    """Whether chunks of this length are n numbers without a rest."""
    return n % chunk == 0


@triton.jit
def round_tf32(tile):
    """Rounded to tf32's 10 bits: matrix units ignore the other 13, and so truncate. NaN and infinities stay what they are.

    Truncation is biased, and the steps of a flow add it up: 6 to 10 times the error of rounding after three steps. Triton
    leaves it at that: no cvt in the PTX of a "tf32" product, for mma.sync, wgmma or tcgen05, in 3.6 and 3.9 ("tf32x3" rounds
    its high parts). Rounding costs two instructions a number, a comparison and an addition.
    """
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [tile], tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, with packed weights b; "bf16" and "tf32" round a, never the accumulator."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        if COMPILED and PRECISION == "tf32":
            a = round_tf32(a)
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_weight(weight, i, j, N_I: tl.constexpr, N_J: tl.constexpr, STRIDE_I: tl.constexpr, STRIDE_J: tl.constexpr):
    """weight[i, j] [I, J] of a packed matrix, zero where i ≥ N_I or j ≥ N_J; swapped strides give the transpose.

    i and j are whole chunks of their lengths, so that no mask is needed where these divide N_I and N_J.
    """
    at = weight + i[:, None] * STRIDE_I + j[None, :] * STRIDE_J
    I_FITS: tl.constexpr = divides(i.shape[0], N_I)
    J_FITS: tl.constexpr = divides(j.shape[0], N_J)
    if I_FITS and J_FITS:
        return tl.load(at)
    elif I_FITS:
        return tl.load(at, mask=(j < N_J)[None, :], other=0.0)
    elif J_FITS:
        return tl.load(at, mask=(i < N_I)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(i < N_I)[:, None] & (j < N_J)[None, :], other=0.0)


@triton.jit
def load_bias(bias, column, N: tl.constexpr):
    """A packed bias (N,) at some columns, as a row [1, J].

    It is added behind a product. As the start of the sum, its load, some 300 clocks from L2, stood before the first product
    of every chunk; behind it, it is over before the product is.
    """
    if divides(column.shape[0], N):
        return tl.load(bias + column)[None, :]
    else:
        return tl.load(bias + column, mask=column < N, other=0.0)[None, :]


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
    """Columns < N of a tile [BM, J], a whole chunk of columns, into rows of ROW_STRIDE numbers, in their dtype."""
    at = rows_of + row[:, None] * ROW_STRIDE + column[None, :]
    mask = live[:, None]
    if not divides(column.shape[0], N):
        mask = mask & (column < N)[None, :]
    tl.store(at, tile.to(rows_of.dtype.element_ty), mask=mask)


@triton.jit
def keep_columns(tile, column, N: tl.constexpr):
    """Zero in the columns ≥ N of a tile [BM, J], a whole chunk of columns."""
    if divides(column.shape[0], N):
        return tile
    else:
        return tl.where((column < N)[None, :], tile, 0.0)


@triton.jit
def product(
    acc, rows_of, row, live, ROW_STRIDE: tl.constexpr, weight, column, N: tl.constexpr, N_IN: tl.constexpr,
    N_OUT: tl.constexpr, STRIDE_I: tl.constexpr, STRIDE_J: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, J] + a w[:, column], with the rows a (·, N) in memory and w (N_IN, N_OUT), BK columns of a at a time."""
    for start in range(0, N_IN, BK):
        inner = start + tl.arange(0, BK)
        at = rows_of + row[:, None] * ROW_STRIDE + inner[None, :]
        if divides(BK, N):
            a = tl.load(at, mask=live[:, None], other=0.0)  # [BM, BK]
        else:
            a = tl.load(at, mask=live[:, None] & (inner < N)[None, :], other=0.0)
        w = load_weight(weight, inner, column, N_IN, N_OUT, STRIDE_I, STRIDE_J)  # [BK, J]
        acc = dot(a, w, acc, PRECISION)
    return acc


@triton.jit
def load_map(matrix, HALF: tl.constexpr):
    """The four blocks [HALF, HALF] of a packed map: rows of p, of v; columns of p, of v. No tiles where they are too wide.

    Asked for at once, and long before they are used: as four loads, each behind the product of the last one, they were some
    3,600 clocks a step.
    """
    half = tl.arange(0, HALF)
    at = matrix + half[:, None] * (2 * HALF) + half[None, :]
    if HALF > 32:
        return matrix, matrix, matrix, matrix
    else:
        return tl.load(at), tl.load(at + HALF), tl.load(at + 2 * HALF * HALF), tl.load(at + 2 * HALF * HALF + HALF)


@triton.jit
def add_wide(
    y_p, y_v, rows_of, row, live, D: tl.constexpr, N: tl.constexpr, matrix, HALF: tl.constexpr, STRIDE_I: tl.constexpr,
    STRIDE_J: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[y_p, y_v] + a w, with a the first N of rows of D numbers in memory, and w HALF rows of a packed map."""
    half = tl.arange(0, HALF)
    for start in range(0, HALF, BK):
        inner = start + tl.arange(0, BK)
        mask = live[:, None] & (inner < N)[None, :]
        a = tl.load(rows_of + row[:, None] * D + inner[None, :], mask=mask, other=0.0)  # [BM, BK]
        y_p = dot(a, load_weight(matrix, inner, half, HALF, HALF, STRIDE_I, STRIDE_J), y_p, PRECISION)  # [BM, HALF]
        y_v = dot(a, load_weight(matrix + HALF * STRIDE_J, inner, half, HALF, HALF, STRIDE_I, STRIDE_J), y_v, PRECISION)
    return y_p, y_v


@triton.jit
def affine(
    p, v, a_pp, a_pv, a_vp, a_vv, matrix, scratch, row, live, D: tl.constexpr, HALF: tl.constexpr,
    TRANSPOSED: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[p, v] A, or [p, v] Aᵀ, with a packed A in four blocks, as `load_map` gives them: no tile is ever split or joined.

    Blocks of more than 32 columns do not fit into registers: at D 256 in full precision 1,900 bytes were spilled. There
    the rows [p, v] pass through `scratch` (·, D), as staged hidden layers do, and the matrix is read BK rows at a time.
    """
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    half = tl.arange(0, HALF)
    y_p = tl.zeros_like(p)
    y_v = tl.zeros_like(v)
    if HALF > 32:
        STRIDE_I: tl.constexpr = 1 if TRANSPOSED else 2 * HALF
        STRIDE_J: tl.constexpr = 2 * HALF if TRANSPOSED else 1
        store_halves(scratch, p, v, row, live, D, HALF)
        tl.debug_barrier()
        y_p, y_v = add_wide(y_p, y_v, scratch, row, live, D, P, matrix, HALF, STRIDE_I, STRIDE_J, BK, PRECISION)
        of_v = matrix + HALF * STRIDE_I
        y_p, y_v = add_wide(y_p, y_v, scratch + P, row, live, D, T, of_v, HALF, STRIDE_I, STRIDE_J, BK, PRECISION)
        tl.debug_barrier()  # whoever writes there next waits until all is read
    elif TRANSPOSED:
        y_p = dot(p, tl.trans(a_pp), y_p, PRECISION)  # [BM, HALF]
        y_v = dot(p, tl.trans(a_vp), y_v, PRECISION)
        y_p = dot(v, tl.trans(a_pv), y_p, PRECISION)
        y_v = dot(v, tl.trans(a_vv), y_v, PRECISION)
    else:
        y_p = dot(p, a_pp, y_p, PRECISION)  # [BM, HALF]
        y_v = dot(p, a_pv, y_v, PRECISION)
        y_p = dot(v, a_vp, y_p, PRECISION)
        y_v = dot(v, a_vv, y_v, PRECISION)
    return keep_columns(y_p, half, P), keep_columns(y_v, half, T)
