"""A whole masked autoregressive flow in one launch: data → noise, or with INVERSE noise → data.

For k = 0 … K−1 (INVERSE: K−1 … 0), every row for itself:

    forward   y = x A_k + c_k;   θ_d = MADE_k(y_<d, context) of all features at once;   x_d ← T(y_d; θ_d)
    INVERSE   for d = 1 … D: the hidden units that y_<d determines, θ_d, y_d = T⁻¹(x_d; θ_d);   x ← (y − c_k) A_k⁻¹

The inverse computes each hidden unit once, as soon as all features that it sees are known, in tiles of at least 16: at D 10,
H 50 each feature extends every layer by one tile, where a loop of D passes computes four. What it takes is time: a
feature is a chain of as many products as the network has layers, each behind a barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.autoregressive_features import features
from glf_fast.kernels.autoregressive_packing import autoregressive_sizes, pack_masked, up
from glf_fast.kernels.flow_options import FlowOptions, operand_dtype
from glf_fast.kernels.launch import launch
from glf_fast.kernels.launch_table import INTERPRETED, Launch
from glf_fast.kernels.masked_mlp import add_context, copy_rows, map_rows, reach, shift_rows, units

__all__ = ["autoregressive_forward", "autoregressive_kernel", "kernel_constants", "launch_of"]

# Rows up to which a batch is few: programs of 16 rows, as many as there can be. Beyond, larger tiles, because every program
# reads all weights from L2. Not tuned, and not measured: compiled for the sizes that tools/shipped.py names.
FEW = 4096


def launch_of(inverse: bool, backward: bool, rows: int, device: torch.device) -> Launch:
    """How a kernel is launched. That of an inverse works on tiles of 16 units and features, for which two warps are enough."""
    if device.type == "cpu":
        return INTERPRETED
    if inverse:
        return Launch(16, 16, 32 if backward else 64, True, 2, 3)
    return Launch(16, 64, 32, True, 4, 3) if rows <= FEW else Launch(32, 64, 32, True, 8, 3)


@triton.jit(do_not_specialize=["density", "rows", "steps"])
def autoregressive_kernel(
    x, maps, weights, vectors, seen, context, out, logdet, saved, hidden, work, density, rows, steps,
    D: tl.constexpr, C: tl.constexpr, CONTEXT_LAYER: tl.constexpr, HIDDEN: tl.constexpr, NUMBERS: tl.constexpr,
    COLUMNS: tl.constexpr, ROW_STRIDE: tl.constexpr, WORK: tl.constexpr, WEIGHTS: tl.constexpr,
    VECTORS: tl.constexpr, SEEN: tl.constexpr, SPLINE: tl.constexpr, ACTIVATION: tl.constexpr,
    LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr, INVERSE: tl.constexpr, SAVE: tl.constexpr, MAP: tl.constexpr,
    MLP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: BM rows through all steps, with packed parameters. The constants are those of `autoregressive_sizes`.

    SAVE: of each step the features on the network's side of it (INVERSE) or of its map.
    """
    LAYERS: tl.constexpr = len(HIDDEN) + 1
    STATE: tl.constexpr = x.dtype.element_ty
    KEPT: tl.constexpr = COLUMNS[LAYERS - 1]  # numbers of a row of `hidden`
    SQUARE: tl.constexpr = up(D) * up(D)
    one = tl.full([], 1, tl.int64)  # distances between steps and programs are 64-bit products, those in a tile 32-bit
    zero = tl.full([], 0, tl.int32)
    first = tl.program_id(0) * (one * BM)
    row = tl.arange(0, BM)
    live = row < rows - first  # [BM]
    out += first * D
    hidden += first * KEPT
    work += first * WORK
    context += first * C
    total = tl.zeros((BM,), STATE)  # [BM], Σ log|T'|
    copy_rows(x + first * D, D, out, D, row, live, D, BN)
    tl.debug_barrier()

    for i in range(steps):
        k = one * (steps - 1 - i) if INVERSE else one * i
        w = weights + k * WEIGHTS[len(WEIGHTS) - 1]
        b = vectors + k * VECTORS[len(VECTORS) - 1]
        s = seen + k * SEEN[LAYERS]
        if C > 0:
            add_context(
                context, work, hidden, hidden, row, live, w, b, C, CONTEXT_LAYER, D, HIDDEN, COLUMNS, WEIGHTS, VECTORS, WORK,
                KEPT, ACTIVATION, False, BM, BN, BK, MLP, STATE,
            )  # fmt: skip
        if INVERSE:
            tl.debug_barrier()
            for d in range(D):
                for layer in tl.static_range(LAYERS - 1):
                    units(
                        layer, reach(layer, d - 1, s, HIDDEN, SEEN), reach(layer, d, s, HIDDEN, SEEN), work, hidden, hidden,
                        row, live, w, b, s, D, C, HIDDEN, COLUMNS, WEIGHTS, VECTORS, SEEN, WORK, KEPT, ACTIVATION, False,
                        BM, BN, BK, MLP, STATE,
                    )  # fmt: skip
                    tl.debug_barrier()
                total = features(
                    total, d, d + 1, out, D, work, WORK, hidden, row, live, rows - first, w, b, s, D, HIDDEN, NUMBERS, COLUMNS,
                    WEIGHTS, VECTORS, SEEN, KEPT, SPLINE, LOG_SCALE, CONSTANT, True, GROUP, BM, BK, MLP, STATE,
                )  # fmt: skip
                tl.debug_barrier()
            if SAVE:
                copy_rows(work, WORK, saved + (k * rows + first) * D, D, row, live, D, BN)
            shift_rows(work, WORK, work + D, WORK, row, live, b, D, BN)
            tl.debug_barrier()
            map_rows(work + D, WORK, out, D, row, live, maps + k * SQUARE, b, D, False, False, BM, BN, BK, MAP, STATE)
        else:
            if SAVE:
                copy_rows(out, D, saved + (k * rows + first) * D, D, row, live, D, BN)
            map_rows(out, D, work, WORK, row, live, maps + k * SQUARE, b, D, True, False, BM, BN, BK, MAP, STATE)
            tl.debug_barrier()
            for layer in tl.static_range(LAYERS - 1):
                units(
                    layer, zero, zero + HIDDEN[layer], work, hidden, hidden, row, live, w, b, s, D, C, HIDDEN, COLUMNS,
                    WEIGHTS, VECTORS, SEEN, WORK, KEPT, ACTIVATION, False, BM, BN, BK, MLP, STATE,
                )  # fmt: skip
                tl.debug_barrier()
            total = features(
                total, zero, zero + D, work, WORK, out, D, hidden, row, live, rows - first, w, b, s, D, HIDDEN, NUMBERS,
                COLUMNS, WEIGHTS, VECTORS, SEEN, KEPT, SPLINE, LOG_SCALE, CONSTANT, False, GROUP, BM, BK, MLP, STATE,
            )  # fmt: skip
        tl.debug_barrier()

    if density:
        for start in range(0, D, BN):
            column = start + tl.arange(0, BN)
            mask = live[:, None] & (column < D)[None, :]
            z = tl.load(out + row[:, None] * D + column[None, :], mask=mask, other=0.0)
            total -= 0.5 * tl.sum(z * z, 1)
        total -= D * 0.91893853320467274178  # D/2 log 2π
    tl.store(logdet + first + row, total, mask=live)


def kernel_constants(sizes: dict[str, Any], options: FlowOptions, how: Launch) -> dict[str, Any]:
    """The constants that both kernels share, and launch options. Splines of single features go in pairs, 16 numbers a tile."""
    constants = sizes | options.constants() | how.constants()
    del constants["ADD_FIRST"]
    return constants | ({"GROUP": 2} if options.inverse else {})


def autoregressive_forward(
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    seen: Tensor,
    context: Tensor | None,
    options: FlowOptions,
    context_layer: bool,
    density: bool,
    save: bool,
    how: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, D), Σ log|T'| (B,) of the direction applied, and with `save` what the backward starts from (K, B, D), else (0,).

    `density` adds log N(out; 0, I). Contiguous tensors of one dtype on one device: `x` (B, D); `matrix` (K, D, D), A or with
    options.inverse A⁻¹; `offset` (K, D); weights, biases and `seen` as in `ops.autoregressive_flow`; `context` (B, C) or None.
    Two launches: the parameters are packed, then all steps follow. Rows of one step pass through memory: their state, and all
    their hidden layers.
    """
    batch, steps = len(x), len(matrix)
    out, logdet = torch.empty_like(x), x.new_empty(batch)
    saved = x.new_empty((steps, batch, x.shape[1]) if save else 0)
    if batch == 0:
        return out, logdet, saved
    widths = [w.shape[2] for w in weights[: len(weights) - 1 - context_layer]]
    context_dim = 0 if context is None else context.shape[1]
    sizes = autoregressive_sizes(x.shape[1], widths, context_dim, context_layer, options.spline)
    how = how or launch_of(options.inverse, False, batch, x.device)
    packed = pack_masked(matrix, offset, weights, biases, seen, sizes, options)
    hidden = x.new_empty((batch, sizes["COLUMNS"][len(widths)]), dtype=operand_dtype(x, options))
    launch(
        autoregressive_kernel, triton.cdiv(batch, how.rows), x,
        x, packed.maps, packed.weights, packed.vectors, seen, x if context is None else context, out, logdet, saved, hidden,
        x.new_empty(batch, sizes["WORK"]), int(density), batch, steps,
        **kernel_constants(sizes, options, how), SAVE=save,
    )  # fmt: skip
    return out, logdet, saved
