"""The backward of a whole masked autoregressive flow: launches that walk the steps back, then matrix products.

As that of coupling flows (coupling_flow_backward.py) it recomputes the network of each step, writes hidden layers and their
gradients into a workspace, and makes the gradients of all weights by one batched product each. The network's input is y in both
directions. The inverse has saved y, the other finds it at once, so that both recompute the network in one pass.

    forward   ∂y_d = ∂x_d·T'(y_d) + (what comes back from all θ);   ∂x = ∂y Aᵀ;   ∂A = xᵀ ∂y;   ∂c = Σ ∂y
    INVERSE   ∂s = ∂x A⁻ᵀ;   ∂A⁻¹ = (y − c)ᵀ ∂x;   ∂c = −Σ ∂s;   for d = D … 1: ∂y_d = ∂s_d + (what comes back from θ_>d), which
              is complete by then; from it ∂z_d = ∂y_d / T'(y_d) and ∂θ_d; and the gradients of the hidden units that no feature
              before d sees

The second is the triangular system of the implicit function. It is solved at the cost of one pass of the network, in the stages
of the inverse, the last one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.autoregressive_features import features_backward
from glf_fast.kernels.autoregressive_flow import kernel_constants, launch_of
from glf_fast.kernels.autoregressive_packing import autoregressive_sizes, pack_masked, up, used_numbers
from glf_fast.kernels.flow_options import FlowOptions, operand_dtype
from glf_fast.kernels.launch import launch
from glf_fast.kernels.launch_table import Launch
from glf_fast.kernels.masked_mlp import (
    add_context,
    context_layer_backward,
    copy_rows,
    map_rows,
    of_network,
    reach,
    shift_rows,
    units,
    units_backward,
)
from glf_fast.kernels.portions import bmm, multiprocessors, over_rows, portions
from glf_fast.kernels.sums import column_sums

__all__ = ["autoregressive_backward", "autoregressive_backward_kernel"]


@triton.jit(do_not_specialize=["density", "rows", "batch", "steps"])
def autoregressive_backward_kernel(
    grad_out, grad_logdet, grad_x, saved, maps, weights, vectors, seen, context, hidden, slopes, map_in, map_grad, work,
    density, rows, batch, steps,
    D: tl.constexpr, C: tl.constexpr, CONTEXT_LAYER: tl.constexpr, HIDDEN: tl.constexpr, NUMBERS: tl.constexpr,
    COLUMNS: tl.constexpr, ROW_STRIDE: tl.constexpr, WORK: tl.constexpr, WEIGHTS: tl.constexpr,
    VECTORS: tl.constexpr, SEEN: tl.constexpr, SPLINE: tl.constexpr, ACTIVATION: tl.constexpr,
    LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr, INVERSE: tl.constexpr, MAP: tl.constexpr, MLP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: BM rows back through some steps, with packed parameters. `rows` of a slab out of a `batch`.

    `grad_out` may be `grad_x`. Else as in `autoregressive_backward`.
    """
    LAYERS: tl.constexpr = len(HIDDEN) + 1
    STATE: tl.constexpr = saved.dtype.element_ty
    INPUT: tl.constexpr = COLUMNS[len(COLUMNS) - 1]  # where [context, y] are in a row of `hidden`
    SQUARE: tl.constexpr = up(D) * up(D)
    one = tl.full([], 1, tl.int64)
    zero = tl.full([], 0, tl.int32)
    first = tl.program_id(0) * (one * BM)
    row = tl.arange(0, BM)
    live = row < rows - first  # [BM]
    left = rows - first
    context += first * C
    grad_x += first * D
    work += first * WORK
    g_logdet = tl.load(grad_logdet + first + row, mask=live, other=0.0)  # [BM]
    for start in range(0, D, BN):
        column = start + tl.arange(0, BN)
        mask = live[:, None] & (column < D)[None, :]
        g = tl.load(grad_out + first * D + row[:, None] * D + column[None, :], mask=mask, other=0.0)
        if density:  # log N(z; 0, I)'s own gradient
            g = -g * g_logdet[:, None]
        tl.store(grad_x + row[:, None] * D + column[None, :], g, mask=mask)
    tl.debug_barrier()

    for i in range(steps):
        k = one * i if INVERSE else one * (steps - 1 - i)
        A = maps + k * SQUARE
        w = weights + k * WEIGHTS[len(WEIGHTS) - 1]
        b = vectors + k * VECTORS[len(VECTORS) - 1]
        s = seen + k * SEEN[LAYERS]
        h = hidden + (k * rows + first) * ROW_STRIDE
        g_h = slopes + (k * rows + first) * ROW_STRIDE
        here = (k * rows + first) * D
        given = saved + (k * batch + first) * D

        # The network at y, and with INVERSE what its gradients begin with.
        if INVERSE:
            copy_rows(given, D, work, WORK, row, live, D, BN)
            shift_rows(given, D, map_in + here, D, row, live, b, D, BN)
            copy_rows(grad_x, D, map_grad + here, D, row, live, D, BN)
            map_rows(grad_x, D, work + D, WORK, row, live, A, b, D, False, True, BM, BN, BK, MAP, STATE)
        else:
            map_rows(given, D, work, WORK, row, live, A, b, D, True, False, BM, BN, BK, MAP, STATE)
        if C > 0:
            copy_rows(context, C, h + INPUT, ROW_STRIDE, row, live, C, BN)
            add_context(
                context, work, h, g_h, row, live, w, b, C, CONTEXT_LAYER, D, HIDDEN, COLUMNS, WEIGHTS, VECTORS, WORK,
                ROW_STRIDE, ACTIVATION, True, BM, BN, BK, MLP, STATE,
            )  # fmt: skip
        tl.debug_barrier()
        copy_rows(work, WORK, h + INPUT + C, ROW_STRIDE, row, live, D, BN)
        for layer in tl.static_range(LAYERS - 1):
            units(
                layer, zero, zero + HIDDEN[layer], work, h, g_h, row, live, w, b, s, D, C, HIDDEN, COLUMNS, WEIGHTS,
                VECTORS, SEEN, WORK, ROW_STRIDE, ACTIVATION, True, BM, BN, BK, MLP, STATE,
            )  # fmt: skip
            tl.debug_barrier()

        if INVERSE:
            for j in range(D):
                d = D - 1 - j
                if j > 0:
                    of_network(
                        d, d + 1, work + D, WORK, work + D, WORK, g_h, row, live, w, s, D, HIDDEN, ROW_STRIDE, BM, BN, BK, MLP,
                        STATE,
                    )  # fmt: skip
                    tl.debug_barrier()
                features_backward(
                    d, d + 1, work, WORK, work + D, WORK, grad_x, D, g_logdet, h, g_h, row, live, left, w, b, s, D, HIDDEN,
                    NUMBERS, COLUMNS, WEIGHTS, VECTORS, SEEN, ROW_STRIDE, SPLINE, LOG_SCALE, CONSTANT, True, GROUP, BM, BK, MLP,
                    STATE,
                )  # fmt: skip
                tl.debug_barrier()
                for layer in tl.static_range(LAYERS - 2, -1, -1):
                    # With the last feature also those units that no feature sees, whose gradient is zero.
                    end = tl.where(j == 0, HIDDEN[layer], reach(layer, d, s, HIDDEN, SEEN))
                    units_backward(
                        layer, reach(layer, d - 1, s, HIDDEN, SEEN), end, h, g_h, row, live, w, s, D, HIDDEN, NUMBERS, COLUMNS,
                        WEIGHTS, SEEN, ROW_STRIDE, ACTIVATION, BM, BN, BK, MLP, STATE,
                    )  # fmt: skip
                    tl.debug_barrier()
        else:
            features_backward(
                zero, zero + D, work, WORK, grad_x, D, work + D, WORK, g_logdet, h, g_h, row, live, left, w, b, s, D,
                HIDDEN, NUMBERS, COLUMNS, WEIGHTS, VECTORS, SEEN, ROW_STRIDE, SPLINE, LOG_SCALE, CONSTANT, False, GROUP, BM,
                BK, MLP, STATE,
            )  # fmt: skip
            tl.debug_barrier()
            for layer in tl.static_range(LAYERS - 2, -1, -1):
                units_backward(
                    layer, zero, zero + HIDDEN[layer], h, g_h, row, live, w, s, D, HIDDEN, NUMBERS, COLUMNS, WEIGHTS, SEEN,
                    ROW_STRIDE, ACTIVATION, BM, BN, BK, MLP, STATE,
                )  # fmt: skip
                tl.debug_barrier()
            of_network(
                zero, zero + D, work + D, WORK, map_grad + here, D, g_h, row, live, w, s, D, HIDDEN, ROW_STRIDE, BM, BN, BK,
                MLP, STATE,
            )  # fmt: skip
            tl.debug_barrier()
            map_rows(map_grad + here, D, grad_x, D, row, live, A, b, D, False, True, BM, BN, BK, MAP, STATE)
        if CONTEXT_LAYER:
            context_layer_backward(h, g_h, row, live, HIDDEN, COLUMNS, ROW_STRIDE, ACTIVATION, BN, STATE)
        tl.debug_barrier()


def autoregressive_backward(
    grad_out: Tensor,
    grad_logdet: Tensor,
    saved: Tensor,
    matrix: Tensor,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    seen: Tensor,
    context: Tensor | None,
    options: FlowOptions,
    context_layer: bool,
    density: bool,
    parameters: bool,
    of_context: bool,
    how: Launch | None = None,
) -> list[Tensor]:
    """∂x (B, D), ∂context (B, C) if `of_context`, else (0,), and with `parameters` those of matrix, offset, weights and
    biases, in this order.

    `saved` (K, B, D) is what `autoregressive_forward` saved. With `density`, `grad_out` holds the output z itself: the gradient
    is −z·∂logdet. All else as in `autoregressive_forward`. For every portion of steps and rows (`portions`): one launch for all
    steps, one for sums over rows, and a batched matrix product for the maps and for each weight.
    """
    (batch, dim), steps = grad_out.shape, len(matrix)
    widths = [w.shape[2] for w in weights[: len(weights) - 1 - context_layer]]
    context_dim = 0 if context is None else context.shape[1]
    dtype = operand_dtype(grad_out, options)
    sizes = autoregressive_sizes(dim, widths, context_dim, context_layer, options.spline)
    stride = sizes["ROW_STRIDE"]
    how = how or launch_of(options.inverse, True, batch, grad_out.device)
    processors = multiprocessors(grad_out.device)
    stacks = 2 if options.inverse else 1  # of rows: the forward's maps have been given their inputs, which are saved
    row_bytes = 2 * stride * dtype.itemsize + stacks * dim * grad_out.itemsize
    slab, group = portions(batch, steps, row_bytes, how, processors)

    grad_x = torch.empty_like(grad_out)
    grad_context = torch.empty_like(context) if of_context and context is not None else grad_out.new_empty(0)
    # One workspace for all portions: the next one's kernel runs after the products of the last.
    workspace = grad_out.new_empty(2 * group * slab * stride, dtype=dtype)
    maps = grad_out.new_empty(stacks * group * slab * dim)
    work = grad_out.new_empty(slab, sizes["WORK"])
    sums = column_sums(steps, slab, _summed(sizes), False, grad_out) if parameters else None
    products = [torch.empty_like(matrix), *_of_networks(weights, sizes)]
    starts = range(0, steps, group)
    for start in starts if options.inverse else reversed(starts):
        these = slice(start, min(start + group, steps))
        count = these.stop - start
        packed = pack_masked(
            matrix[these],
            offset[these],
            [w[these] for w in weights],
            [b[these] for b in biases],
            seen[these],
            sizes,
            options,
        )
        last = start == (0 if options.inverse else starts[-1])  # of the flow: nothing has come back yet
        for first in range(0, max(batch, 1), slab):
            rows = min(slab, batch - first)
            here = slice(first, first + rows)
            hidden, slopes = workspace[: 2 * count * rows * stride].view(2, count, rows, stride)
            map_grad = maps[: count * rows * dim].view(count, rows, dim)
            map_in = maps[len(maps) // 2 :][: count * rows * dim].view_as(map_grad) if options.inverse else map_grad
            launch(
                autoregressive_backward_kernel, triton.cdiv(rows, how.rows), grad_out,
                (grad_out if last else grad_x)[here], grad_logdet[here], grad_x[here], saved[these, here], packed.maps,
                packed.weights, packed.vectors, seen[these], grad_out if context is None else context[here], hidden, slopes,
                map_in, map_grad, work, int(density and last), rows, batch, count,
                **kernel_constants(sizes, options, how),
            )  # fmt: skip
            if of_context and context is not None:
                at = sizes["COLUMNS"][len(widths)] if context_layer else 0
                its_rows = (weights[-1] if context_layer else weights[0][:, :context_dim])[these].mT.to(dtype)
                found = bmm(slopes[..., at : at + widths[0]], its_rows).sum(0)
                grad_context[here] = found if last else grad_context[here] + found
            if sums is None:
                continue
            sums.add(slopes, map_grad, grad_logdet[here], start, accumulate=first > 0)
            pairs = [(map_in if options.inverse else saved[these, here], map_grad), *_pairs(hidden, slopes, sizes)]
            for total, (a, b) in zip(products, pairs, strict=True):
                found = over_rows(a, b, processors)
                if first:
                    total[these] += found
                else:
                    total[these] = found
    if sums is None:
        return [grad_x, grad_context]
    grad_matrix, *grad_weights = products
    *grad_biases, grad_offset, _ = sums.totals()
    if options.inverse:
        grad_offset = -torch.bmm(grad_offset.unsqueeze(1), matrix.mT).squeeze(1)
    out = len(widths)
    grad_biases = [*grad_biases[:out], used_numbers(grad_biases[-1], sizes), *grad_biases[out:-1]]
    grad_weights[out] = used_numbers(grad_weights[out], sizes)
    _clear_unseen(grad_weights[: out + 1], seen, sizes)
    return [grad_x, grad_context, grad_matrix, grad_offset, *grad_weights, *grad_biases]


def _summed(sizes: dict[str, Any]) -> dict[str, Any]:
    """The layers for `column_sums`, and where they are in a row of slopes."""
    hidden = sizes["HIDDEN"]
    return {
        "HIDDEN": hidden + hidden[: sizes["CONTEXT_LAYER"]],
        "N_RAW": sizes["NUMBERS"] * sizes["D"],
        "D": sizes["D"],
        "COLUMNS": sizes["COLUMNS"],
        "ROW_STRIDE": sizes["ROW_STRIDE"],
    }


def _of_networks(weights: Sequence[Tensor], sizes: dict[str, Any]) -> list[Tensor]:
    """Room for the gradients of all weights; of the last layer with its padding."""
    found = [torch.empty_like(w) for w in weights]
    out = len(sizes["HIDDEN"])
    found[out] = weights[out].new_empty(*weights[out].shape[:2], sizes["NUMBERS"] * sizes["D"])
    return found


def _pairs(hidden: Tensor, slopes: Tensor, sizes: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Inputs, and gradients of outputs, of all layers in the order of their weights."""
    dim, context, widths, columns = sizes["D"], sizes["C"], sizes["HIDDEN"], sizes["COLUMNS"]
    at = columns[-1]
    begin = at + context if sizes["CONTEXT_LAYER"] else at
    inputs = [hidden[..., begin : at + context + dim]]
    inputs += [hidden[..., column : column + n] for column, n in zip(columns, widths, strict=False)]
    grads = [slopes[..., column : column + n] for column, n in zip(columns, widths, strict=False)]
    grads.append(slopes[..., at : at + sizes["NUMBERS"] * dim])
    if sizes["CONTEXT_LAYER"]:
        inputs.append(hidden[..., at : at + context])
        own = columns[len(widths)]
        grads.append(slopes[..., own : own + widths[0]])
    return list(zip(inputs, grads, strict=True))


def _clear_unseen(grads: Sequence[Tensor], seen: Tensor, sizes: dict[str, Any]) -> None:
    """Gradients of weights that are not read become zeros."""
    inputs = (sizes["D"], *sizes["HIDDEN"])
    for grad, n, sees in zip(grads, inputs, seen.split([*sizes["HIDDEN"], sizes["D"]], 1), strict=True):
        of_units = grad[:, grad.shape[1] - n :].unflatten(2, (sees.shape[1], -1))  # (K, n, units, numbers of each)
        unit = torch.arange(n, device=grad.device)[:, None]
        of_units.masked_fill_((unit >= sees[:, None, :])[..., None], 0)
