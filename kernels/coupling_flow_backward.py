"""The backward of the whole coupling flow: launches that walk the steps from the last to the first, then matrix products.

The kernel carries ∂x in registers, recomputes the MLP of every step and writes its hidden layers and their gradients into
a workspace, some steps beside one another. From them all gradients of parameters of these steps are made
(weight_gradients.py), in one launch where the CUDA kernels are. So they are deterministic and run at full speed; atomics or
per-program sums would do neither.

One step forward is z = [p, v·e^ℓ + t] of [p, v] = x A + c with ℓ = f(u). Given ∂z and ∂logdet:

    ∂t = ∂z_v;  ∂v = ∂z_v·e^ℓ;  ∂ℓ = ∂v·v + ∂logdet;  ∂u = ∂ℓ·f'(u);  ∂p = ∂z_p + MLP'(∂u, ∂t)
    ∂x = ∂y Aᵀ;  ∂A = xᵀ ∂y;  ∂c = Σ ∂y

One step of the inverse is x = (y − c) A⁻¹ of y = [p, (w − t)·e^−ℓ]. Given ∂x and ∂logdet:

    ∂y = ∂x A⁻ᵀ;  ∂A⁻¹ = (y − c)ᵀ ∂x;  ∂c = −Σ ∂y;  ∂w = ∂y_v·e^−ℓ;  ∂t = −∂w;  ∂ℓ = −∂y_v·v − ∂logdet

With SPLINE the gradients of the splines' numbers stand for ∂u and ∂t (spline_coupling.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.coupling_flow import couple
from glf_fast.kernels.flow_options import FlowOptions, operand_dtype, sizes
from glf_fast.kernels.launch import launch
from glf_fast.kernels.launch_table import Launch, launch_for
from glf_fast.kernels.math import log_scale, log_scale_slope
from glf_fast.kernels.mlp import hidden_layers, mlp, mlp_backward, mlp_backward_of_memory
from glf_fast.kernels.packing import pack
from glf_fast.kernels.portions import bmm, multiprocessors, portions
from glf_fast.kernels.spline_coupling import spline_coupling_backward
from glf_fast.kernels.tiles import affine, keep_columns, load_bias, load_halves, load_map, store_halves, store_tile
from glf_fast.kernels.weight_gradients import InBatches, InOneLaunch

__all__ = ["flow_backward", "flow_backward_kernel"]


@triton.jit(do_not_specialize=["density", "more", "rows", "batch", "steps"])
def flow_backward_kernel(
    grad_out, grad_logdet, grad_x, state, rebuilt, maps, unmaps, weights, vectors, context,
    hidden, slopes, map_in, map_grad, density, more, rows, batch, steps,
    D: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTS: tl.constexpr, VECTORS: tl.constexpr, ROW_STRIDE: tl.constexpr, N_RAW: tl.constexpr, SPLINE: tl.constexpr,
    ACTIVATION: tl.constexpr, LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr, ADD_FIRST: tl.constexpr,
    INVERSE: tl.constexpr, SAVED: tl.constexpr, MAP: tl.constexpr, MLP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: BM rows back through some steps, with packed parameters.

    `rows` of a slab out of a `batch`. Without SAVED inputs, `state` is what these steps returned, and with `more` steps to
    come, `rebuilt` gets what went into them. `grad_out` may be `grad_x`, and `state` `rebuilt`. Else as in `flow_backward`.
    """
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    LAYERS: tl.constexpr = len(HIDDEN) + 1
    SPLINES: tl.constexpr = len(SPLINE) > 0
    SQUARE: tl.constexpr = 4 * HALF * HALF
    # Where [p, context] are in a row of `hidden`, and [∂u, ∂t] or those of splines' numbers in one of `slopes`.
    RAW: tl.constexpr = COLUMNS[LAYERS - 1]
    RECOMPUTED: tl.constexpr = INVERSE != SAVED  # whether a step begins with its affine map
    one = tl.full([], 1, tl.int64)
    first = tl.program_id(0) * (one * BM)
    row = tl.arange(0, BM)
    live = row < rows - first  # [BM]
    half = tl.arange(0, HALF)
    context += first * C
    scratch = grad_x + first * D  # until the result is there
    g_p, g_v = load_halves(grad_out + first * D, row, live, D, HALF)  # [BM, HALF]
    g_logdet = tl.load(grad_logdet + first + row, mask=live, other=0.0)[:, None]  # [BM, 1]
    if density:  # log N(z; 0, I)'s own gradient
        g_p = -g_p * g_logdet
        g_v = -g_v * g_logdet
    # What the step at hand returned, or its input where that was saved [BM, HALF].
    k = one * 0 if INVERSE else one * (steps - 1)
    x_p, x_v = load_halves(state + (k * batch if SAVED else 0) * D + first * D, row, live, D, HALF)
    tl.debug_barrier()  # grad_out and state have been read
    forth = unmaps if INVERSE else maps
    b_pp, b_pv, b_vp, b_vv = load_map(forth + k * SQUARE, HALF)
    a_pp, a_pv, a_vp, a_vv = load_map(maps + k * SQUARE, HALF)

    for i in range(steps):
        k = one * i if INVERSE else one * (steps - 1 - i)
        following = tl.minimum(k + 1, steps - 1) if INVERSE else tl.maximum(k - 1, 0)
        kept = (k * rows + first) * ROW_STRIDE
        rows_of_maps = (k * rows + first) * D
        A = maps + k * SQUARE
        w = weights + k * WEIGHTS[len(WEIGHTS) - 1]
        b = vectors + k * VECTORS[LAYERS + 2]
        c_p = load_bias(b, half, HALF)  # [1, HALF]
        c_v = load_bias(b + HALF, half, HALF)

        # p, and the transformed half [BM, HALF]: v where it comes from the affine map, w where it is the coupling's other side.
        if INVERSE:
            store_halves(map_grad + rows_of_maps, g_p, g_v, row, live, D, HALF)
            g_p, g_v = affine(g_p, g_v, a_pp, a_pv, a_vp, a_vv, A, scratch, row, live, D, HALF, True, BK, MAP)
        p = x_p
        v = x_v
        if RECOMPUTED:
            p, v = affine(p, v, b_pp, b_pv, b_vp, b_vv, forth + k * SQUARE, scratch, row, live, D, HALF, False, BK, MAP)
            p += c_p
            v += c_v
        store_tile(hidden + kept + RAW, p, row, live, ROW_STRIDE, half, P)
        if C > 0:
            for start in range(0, C, BK):
                column = start + tl.arange(0, BK)
                mask = live[:, None] & (column < C)[None, :]
                given = tl.load(context + row[:, None] * C + column[None, :], mask=mask, other=0.0)
                store_tile(hidden + kept + RAW + P, given, row, live, ROW_STRIDE, column, C)
        if SPLINES:
            hidden_layers(
                p, context, w, b, hidden + kept, slopes + kept, row, live, C, HIDDEN, COLUMNS, WEIGHTS, VECTORS, ROW_STRIDE,
                ACTIVATION, LAYERS - 1, True, BN, BK, MLP,
            )  # fmt: skip
            # Of these the one that is written at the end has room for the coupling's results until then.
            other = (map_in if INVERSE else map_grad) + rows_of_maps
            found, g_scaled = spline_coupling_backward(  # [BM, HALF]
                v, g_v, g_logdet, hidden + kept, slopes + kept + RAW, w, b, scratch, other, row, live, rows - first, D, HALF,
                HIDDEN, COLUMNS, WEIGHTS, VECTORS, ROW_STRIDE, SPLINE, INVERSE, SAVED, GROUP, BK, MLP,
            )  # fmt: skip
            if INVERSE == SAVED:
                v = found
        else:
            # u, t: [BM, HALF]
            u, t = mlp(
                p, w, context, w, b, hidden + kept, slopes + kept, row, live, D, C, HIDDEN, COLUMNS, WEIGHTS, VECTORS,
                ROW_STRIDE, ACTIVATION, True, True, BN, BK, MLP,
            )  # fmt: skip
            ell = keep_columns(log_scale(u, LOG_SCALE, CONSTANT), half, T)  # [BM, HALF]
            if INVERSE == SAVED:
                v = couple(v, t, tl.exp(-ell), ADD_FIRST, True)

        # The affine map's input [BM, HALF]; in reversible mode also what the step before this one returned.
        if INVERSE:
            store_halves(map_in + rows_of_maps, p - c_p, v - c_v, row, live, D, HALF)
            if not SAVED:
                x_p = p
                x_v = found if SPLINES else couple(v, t, tl.exp(ell), ADD_FIRST, False)
        elif not SAVED:
            U = unmaps + k * SQUARE
            b_pp, b_pv, b_vp, b_vv = load_map(U, HALF)
            x_p = p - c_p
            x_v = v - c_v
            x_p, x_v = affine(x_p, x_v, b_pp, b_pv, b_vp, b_vv, U, scratch, row, live, D, HALF, False, BK, MAP)
            store_halves(map_in + rows_of_maps, x_p, x_v, row, live, D, HALF)

        if SPLINES:
            g_p += mlp_backward_of_memory(  # [BM, HALF]
                w, hidden + kept, slopes + kept, row, live, D, g_p.dtype, HIDDEN, COLUMNS, WEIGHTS, N_RAW, ROW_STRIDE,
                ACTIVATION, BM, HALF, BN, BK, MLP,
            )  # fmt: skip
        else:
            # The coupling: g_scaled, g_t, g_ell, g_u [BM, HALF].
            if INVERSE:
                g_scaled = g_v * tl.exp(-ell)
                g_t = -g_v if ADD_FIRST else -g_scaled
                g_ell = -g_v * (v + t if ADD_FIRST else v) - g_logdet
            else:
                g_scaled = g_v * tl.exp(ell)
                g_t = g_scaled if ADD_FIRST else g_v
                g_ell = g_scaled * (v + t if ADD_FIRST else v) + g_logdet
            g_u = keep_columns(g_ell * log_scale_slope(u, LOG_SCALE, CONSTANT), half, T)
            store_tile(slopes + kept + RAW, g_u, row, live, ROW_STRIDE, half, T)
            store_tile(slopes + kept + RAW + T, g_t, row, live, ROW_STRIDE, half, T)
            g_p += mlp_backward(  # [BM, HALF]
                g_u, g_t, w, hidden + kept, slopes + kept, row, live, D, HIDDEN, COLUMNS, WEIGHTS, ROW_STRIDE, ACTIVATION,
                BN, BK, MLP,
            )  # fmt: skip
        g_v = g_scaled  # [BM, HALF]

        # What the end of this step reads and what the next one begins with: one wait instead of three.
        if SAVED:
            x_p, x_v = load_halves(state + (following * batch + first) * D, row, live, D, HALF)
        if RECOMPUTED:
            b_pp, b_pv, b_vp, b_vv = load_map(forth + following * SQUARE, HALF)
        a_pp, a_pv, a_vp, a_vv = load_map(maps + following * SQUARE if INVERSE else A, HALF)
        if not INVERSE:
            store_halves(map_grad + rows_of_maps, g_p, g_v, row, live, D, HALF)
            g_p, g_v = affine(g_p, g_v, a_pp, a_pv, a_vp, a_vv, A, scratch, row, live, D, HALF, True, BK, MAP)

    store_halves(grad_x + first * D, g_p, g_v, row, live, D, HALF)
    if not SAVED and more:
        store_halves(rebuilt + first * D, x_p, x_v, row, live, D, HALF)


def flow_backward(
    grad_out: Tensor,
    grad_logdet: Tensor,
    state: Tensor,
    matrix: Tensor,
    unmatrix: Tensor | None,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: FlowOptions,
    density: bool,
    parameters: bool,
    of_context: bool,
    how: Launch | None = None,
    one_launch: bool = False,
) -> list[Tensor]:
    """∂x (B, D), ∂context (B, C) if `of_context`, else (0,), and with `parameters` those of matrix, offset, weights and
    biases, in this order.

    `state` is what `flow_forward` saved (K, B, D), or with `unmatrix` (K, D, D), the inverse of `matrix`, its output
    (B, D): inputs are then rebuilt by undoing the steps. With `density`, `grad_out` holds the output z itself: the gradient
    is −z·∂logdet, and log|det A|'s (K,) follows that of the offset. All else as in `flow_forward`.
    For every portion of steps and rows (`portions`): one launch for all steps, and with `one_launch`, for which the operation
    glf_fast::row_products must run here, another for the gradients of all parameters.
    """
    (batch, dim), steps = grad_out.shape, len(matrix)
    widths = [w.shape[2] for w in weights[:-1]]
    context_dim = 0 if context is None else context.shape[1]
    dtype = operand_dtype(grad_out, options)
    constants = sizes(dim, widths, context_dim, options.spline, backward=True)
    columns = constants["COLUMNS"]
    stride = constants["ROW_STRIDE"]
    how = how or launch_for(True, dim, widths, options.mlp_precision, batch, grad_out.device, options.spline)
    processors = multiprocessors(grad_out.device)
    saved = unmatrix is None
    given = saved and not options.inverse  # the forward direction has its maps' inputs already where they were saved
    row_bytes = 2 * stride * dtype.itemsize + (1 if given else 2) * dim * grad_out.itemsize
    slab, group = portions(batch, steps, row_bytes, how, processors)

    grad_x = torch.empty_like(grad_out)
    grad_context = torch.empty_like(context) if of_context and context is not None else grad_out.new_empty(0)
    # One workspace for all portions: the next one's kernel runs after the products of the last.
    workspace = grad_out.new_empty(2 * group * slab * stride, dtype=dtype)
    maps = grad_out.new_empty((1 if given else 2) * group * slab * dim)
    rebuilt = grad_out.new_empty(0) if saved or group == steps else torch.empty_like(grad_out)
    gradients: InBatches | InOneLaunch | None = None
    if parameters and one_launch:
        precisions = (options.map_precision, options.mlp_precision)
        gradients = InOneLaunch((matrix, *weights), constants, density, precisions)
    elif parameters:
        gradients = InBatches((matrix, *weights), constants, density, slab)
    starts = range(0, steps, group)
    for start in starts if options.inverse else reversed(starts):
        these = slice(start, min(start + group, steps))
        count = these.stop - start
        packed = pack(
            matrix[these], None if unmatrix is None else unmatrix[these], offset[these], None,
            [w[these] for w in weights], [b[these] for b in biases], constants, options,
        )  # fmt: skip
        last = start == (0 if options.inverse else starts[-1])  # of the flow: nothing has come back yet
        more = these.stop < steps if options.inverse else start > 0
        for first in range(0, max(batch, 1), slab):
            rows = min(slab, batch - first)
            here = slice(first, first + rows)
            hidden, slopes = workspace[: 2 * count * rows * stride].view(2, count, rows, stride)
            map_grad = maps[: count * rows * dim].view(count, rows, dim)
            map_in = state[these, here] if given else maps[len(maps) // 2 :][: count * rows * dim].view_as(map_grad)
            start_from = state[these, here] if saved else (state if last else rebuilt)[here]
            launch(
                flow_backward_kernel, triton.cdiv(rows, how.rows), grad_out,
                (grad_out if last else grad_x)[here], grad_logdet[here], grad_x[here], start_from, rebuilt[here],
                packed.maps, packed.unmaps, packed.weights, packed.vectors,
                grad_out if context is None else context[here], hidden, slopes, map_in, map_grad,
                int(density and last), int(more), rows, batch, count,
                **constants, **options.constants(), SAVED=saved, **how.constants(),
            )  # fmt: skip
            if of_context and context is not None:
                rows_of_context = weights[0][these, dim - dim // 2 :].mT.to(dtype)
                found = bmm(slopes[..., : widths[0]], rows_of_context).sum(0)
                grad_context[here] = found if last else grad_context[here] + found
            if gradients is None:
                continue
            inputs = [hidden[..., columns[-1] : columns[-1] + dim - dim // 2 + context_dim]]
            inputs += [hidden[..., at : at + n] for at, n in zip(columns, widths, strict=False)]
            slopes_of = [slopes[..., at : at + w.shape[2]] for at, w in zip(columns, weights, strict=True)]
            pairs = [(map_in, map_grad), *zip(inputs, slopes_of, strict=True)]
            gradients.add(pairs, slopes, grad_logdet[here], start, accumulate=first > 0)
    if gradients is None:
        return [grad_x, grad_context]
    made = gradients.results()
    of_offset = -torch.bmm(made.offset.unsqueeze(1), matrix.mT).squeeze(1) if options.inverse else made.offset
    of_density = [made.logabsdet] if density else []
    return [grad_x, grad_context, made.matrix, of_offset, *of_density, *made.weights, *made.biases]
