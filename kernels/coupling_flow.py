"""The whole coupling flow in one launch: data → noise, or with INVERSE noise → data.

For k = 0 … K−1 (INVERSE: K−1 … 0), every row for itself:

    forward   (p, v) = x A_k + c_k;   (u, t) = MLP_k([p, context]);   x ← [p, v·e^f(u) + t]
    INVERSE   (u, t) = MLP_k([p, context]);   v = (w − t)·e^−f(u);    x ← ([p, v] − c_k) A_k⁻¹

With SPLINE, which is empty for affine couplings, the MLP makes numbers of a spline for each v instead (spline_coupling.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.flow_options import FlowOptions, operand_dtype, sizes
from glf_fast.kernels.launch import launch
from glf_fast.kernels.launch_table import Launch, launch_for
from glf_fast.kernels.math import log_scale
from glf_fast.kernels.mlp import hidden_layers, load_first, mlp
from glf_fast.kernels.packing import pack
from glf_fast.kernels.spline_coupling import spline_coupling
from glf_fast.kernels.tiles import affine, keep_columns, load_bias, load_halves, load_map, store_halves

__all__ = ["couple", "flow_forward", "flow_kernel"]


@triton.jit
def couple(v, t, scale, ADD_FIRST: tl.constexpr, UNDO: tl.constexpr):
    """w [BM, HALF] = v·e^ℓ + t (ADD_FIRST: (v + t)·e^ℓ) with scale = e^ℓ; UNDO with scale = e^−ℓ: v from w."""
    if UNDO:
        return v * scale - t if ADD_FIRST else (v - t) * scale
    else:
        return (v + t) * scale if ADD_FIRST else v * scale + t


@triton.jit(do_not_specialize=["density", "rows", "steps"])
def flow_kernel(
    x, maps, weights, vectors, context, out, logdet, saved, hidden, density, rows, steps,
    D: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_STRIDE: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr, N_RAW: tl.constexpr, SPLINE: tl.constexpr,
    ACTIVATION: tl.constexpr, LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr, ADD_FIRST: tl.constexpr,
    INVERSE: tl.constexpr, SAVE: tl.constexpr, STAGED: tl.constexpr, MAP: tl.constexpr, MLP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: BM rows through all steps, with packed parameters. The constants are those of `sizes`."""
    LAYERS: tl.constexpr = len(HIDDEN) + 1
    SPLINES: tl.constexpr = len(SPLINE) > 0
    # Numbers of a row of staged layers: all but the last one, or all.
    KEPT: tl.constexpr = COLUMNS[LAYERS - 1] if SPLINES else COLUMNS[LAYERS - 2]
    # The compiler fetches a step's tiles ahead where no loop is inside the steps'; else the next map is asked for here.
    AHEAD: tl.constexpr = STAGED or COLUMNS[LAYERS - 1] - COLUMNS[LAYERS - 2] > BN or C > BK
    one = tl.full([], 1, tl.int64)  # distances between steps and programs are 64-bit products, those in a tile 32-bit
    first = tl.program_id(0) * (one * BM)
    row = tl.arange(0, BM)
    live = row < rows - first  # [BM]
    half = tl.arange(0, HALF)
    hidden += first * KEPT
    context += first * C
    scratch = out + first * D  # until the result is there
    p, v = load_halves(x + first * D, row, live, D, HALF)  # [BM, HALF]
    total = tl.zeros((BM,), p.dtype)  # [BM], Σ ℓ
    k = one * (steps - 1) if INVERSE else one * 0
    a_pp, a_pv, a_vp, a_vv = load_map(maps + k * (4 * HALF * HALF), HALF)

    for i in range(steps):
        k = one * (steps - 1 - i) if INVERSE else one * i
        matrix = maps + k * (4 * HALF * HALF)
        w = weights + k * WEIGHTS[len(WEIGHTS) - 1]
        b = vectors + k * VECTORS[LAYERS + 2]
        following = tl.maximum(k - 1, 0) if INVERSE else tl.minimum(k + 1, steps - 1)
        if SAVE:
            store_halves(saved + (k * rows + first) * D, p, v, row, live, D, HALF)
        if not AHEAD:
            a_pp, a_pv, a_vp, a_vv = load_map(matrix, HALF)
        w_first = load_first(w, D, HIDDEN, COLUMNS, STAGED)
        c_p = load_bias(b, half, HALF)  # [1, HALF]
        c_v = load_bias(b + HALF, half, HALF)
        if not INVERSE:
            p, v = affine(p, v, a_pp, a_pv, a_vp, a_vv, matrix, scratch, row, live, D, HALF, False, BK, MAP)
            p += c_p
            v += c_v
            if AHEAD:
                a_pp, a_pv, a_vp, a_vv = load_map(maps + following * (4 * HALF * HALF), HALF)
        if SPLINES:
            hidden_layers(
                p, context, w, b, hidden, hidden, row, live, C, HIDDEN, COLUMNS, WEIGHTS, VECTORS, KEPT, ACTIVATION,
                LAYERS - 1, False, BN, BK, MLP,
            )  # fmt: skip
            v, log = spline_coupling(
                v, hidden, w, b, scratch, row, live, rows - first, D, HALF, HIDDEN, COLUMNS, WEIGHTS, VECTORS, KEPT, SPLINE,
                INVERSE, GROUP, BK, MLP,
            )  # fmt: skip
            total += log
        else:
            # u, t: [BM, HALF]
            u, t = mlp(
                p, w_first, context, w, b, hidden, hidden, row, live, D, C, HIDDEN, COLUMNS, WEIGHTS, VECTORS, KEPT,
                ACTIVATION, STAGED, False, BN, BK, MLP,
            )  # fmt: skip
            ell = keep_columns(log_scale(u, LOG_SCALE, CONSTANT), half, D // 2)  # [BM, HALF]
            if INVERSE:
                ell = -ell
            v = couple(v, t, tl.exp(ell), ADD_FIRST, INVERSE)
            total += tl.sum(ell, 1)
        if INVERSE:
            p -= c_p
            v -= c_v
            p, v = affine(p, v, a_pp, a_pv, a_vp, a_vv, matrix, scratch, row, live, D, HALF, False, BK, MAP)
            if AHEAD:
                a_pp, a_pv, a_vp, a_vv = load_map(maps + following * (4 * HALF * HALF), HALF)
        total += tl.load(b + VECTORS[LAYERS + 1])  # log|det A| where it was given

    if density:
        total -= 0.5 * (tl.sum(p * p, 1) + tl.sum(v * v, 1)) + D * 0.91893853320467274178  # D/2 log 2π
    store_halves(out + first * D, p, v, row, live, D, HALF)
    tl.store(logdet + first + row, total, mask=live)


def flow_forward(
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    logabsdet: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: FlowOptions,
    density: bool,
    save: bool,
    how: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, D), Σ ℓ (B,) of the direction applied, and with `save` each step's input (K, B, D), else (0,).

    `density` adds log N(out; 0, I) to Σ ℓ, and `logabsdet`, log|det A| of each step (K,) or their sum (), itself.
    Contiguous tensors of one dtype on one device: `x` (B, D); `matrix` (K, D, D), A or with options.inverse A⁻¹;
    `offset` (K, D); weights (K, nᵢ, nᵢ₊₁) and biases (K, nᵢ₊₁); `context` (B, C) or None.
    `how` replaces the launch table. Two launches: the parameters are packed, then all steps follow. Where hidden layers pass
    through memory, it holds them all, but the last one of an affine coupling, of one step: B rows.
    """
    batch, steps = len(x), len(matrix)
    out, logdet = torch.empty_like(x), x.new_empty(batch)
    saved = x.new_empty((steps, batch, x.shape[1]) if save else 0)
    if batch == 0:
        return out, logdet, saved
    widths = [w.shape[2] for w in weights[:-1]]
    constants = sizes(x.shape[1], widths, 0 if context is None else context.shape[1], options.spline)
    how = how or launch_for(False, x.shape[1], widths, options.mlp_precision, batch, x.device, options.spline)
    kept = constants["COLUMNS"][-1 if options.spline else -2] if how.staged else 0
    hidden = x.new_empty((batch, kept), dtype=operand_dtype(x, options))
    packed = pack(matrix, None, offset, logabsdet, weights, biases, constants, options)
    launch(
        flow_kernel, triton.cdiv(batch, how.rows), x,
        x, packed.maps, packed.weights, packed.vectors, x if context is None else context, out, logdet, saved, hidden,
        int(density), batch, steps,
        **constants, **options.constants(), SAVE=save, STAGED=how.staged, **how.constants(),
    )  # fmt: skip
    return out, logdet, saved
