"""The backward of the whole coupling flow: one launch that walks the steps from the last to the first, then matrix products.

The kernel carries ∂x in registers, recomputes the MLP of every step and writes its hidden layers and their gradients into
a workspace, all K steps beside one another; one batched matrix product per weight makes the weight gradients of all steps.
So they are deterministic and run at the library's full speed; atomics or per-program sums would do neither.

One step forward is z = [p, v·e^ℓ + t] of [p, v] = x A + c with ℓ = f(u). Given ∂z and ∂logdet:

    ∂t = ∂z_v;  ∂v = ∂z_v·e^ℓ;  ∂ℓ = ∂v·v + ∂logdet;  ∂u = ∂ℓ·f'(u);  ∂p = ∂z_p + MLP'(∂u, ∂t)
    ∂x = ∂y Aᵀ;  ∂A = xᵀ ∂y;  ∂c = Σ ∂y

One step of the inverse is x = (y − c) A⁻¹ of y = [p, (w − t)·e^−ℓ]. Given ∂x and ∂logdet:

    ∂y = ∂x A⁻ᵀ;  ∂A⁻¹ = (y − c)ᵀ ∂x;  ∂c = −Σ ∂y;  ∂w = ∂y_v·e^−ℓ;  ∂t = −∂w;  ∂ℓ = −∂y_v·v − ∂logdet
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.coupling_flow import couple
from glf_fast.kernels.flow_options import FlowOptions, operand_dtype, sizes
from glf_fast.kernels.launch import Specialization, launch
from glf_fast.kernels.launch_table import Launch, launch_for
from glf_fast.kernels.math import log_scale, log_scale_slope
from glf_fast.kernels.mlp import mlp, mlp_backward
from glf_fast.kernels.tiles import affine, keep_columns, load_halves, load_offset, store_halves, store_tile

__all__ = ["WORKSPACE_BYTES", "flow_backward", "flow_backward_kernel", "specialization"]

# What a launch may use for hidden layers and gradients; larger batches are worked off in slabs of rows, one after the other.
# A slab has a program for every multiprocessor at least, or most of the GPU would wait: at D 64, H 256, K 64 in bf16, where
# a row takes 180 KB, that is 380 MB.
WORKSPACE_BYTES = 256 << 20


@triton.jit(do_not_specialize=["density", "rows", "batch", "steps"])
def flow_backward_kernel(
    grad_out, grad_logdet, grad_x, state, matrix, unmatrix, offset, weights, biases, context,
    hidden, slopes, map_in, map_grad, density, rows, batch, steps,
    D: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr,
    ADD_FIRST: tl.constexpr, INVERSE: tl.constexpr, SAVED: tl.constexpr, MAP: tl.constexpr, MLP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BM rows back through all steps. `rows` of a slab out of a `batch`; else as in `flow_backward`."""
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    RAW: tl.constexpr = COLUMNS[len(HIDDEN)]  # where p is in a row of `hidden`, and (∂u, ∂t) in one of `slopes`
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
    if not SAVED:
        x_p, x_v = load_halves(state + first * D, row, live, D, HALF)  # [BM, HALF], what the step at hand returned

    for i in range(steps):
        k = one * i if INVERSE else one * (steps - 1 - i)
        kept = (k * rows + first) * ROW_STRIDE
        rows_of_maps = (k * rows + first) * D
        A = matrix + k * (D * D)
        U = unmatrix + k * (D * D)
        c_p, c_v = load_offset(offset + k * D, D, HALF)  # [1, HALF]

        # p, and the transformed half [BM, HALF]: v where it comes from the affine map, w where it is the coupling's other side.
        if INVERSE:
            store_halves(map_grad + rows_of_maps, g_p, g_v, row, live, D, HALF)
            g_p, g_v = affine(g_p, g_v, scratch, row, live, A, D, HALF, True, BK, MAP)
        if SAVED:
            p, v = load_halves(state + (k * batch + first) * D, row, live, D, HALF)
        else:
            p, v = x_p, x_v
        if INVERSE != SAVED:
            p, v = affine(p, v, scratch, row, live, U if INVERSE else A, D, HALF, False, BK, MAP)
            p += c_p
            v += c_v
        store_tile(hidden + kept + RAW, p, row, live, ROW_STRIDE, half, P)
        # u, t: [BM, HALF]
        u, t = mlp(
            p, context, weights, biases, hidden + kept, slopes + kept, row, live, k, D, C, HIDDEN, COLUMNS, ROW_STRIDE,
            ACTIVATION, True, True, BN, BK, MLP,
        )  # fmt: skip
        ell = keep_columns(log_scale(u, LOG_SCALE, CONSTANT), half, T)  # [BM, HALF]
        if INVERSE == SAVED:
            v = couple(v, t, tl.exp(-ell), ADD_FIRST, True)

        # The affine map's input [BM, HALF]; in reversible mode also what the step before this one returned.
        if INVERSE:
            store_halves(map_in + rows_of_maps, p - c_p, v - c_v, row, live, D, HALF)
            if not SAVED:
                x_p = p
                x_v = couple(v, t, tl.exp(ell), ADD_FIRST, False)
        elif not SAVED:
            x_p, x_v = affine(p - c_p, v - c_v, scratch, row, live, U, D, HALF, False, BK, MAP)
            store_halves(map_in + rows_of_maps, x_p, x_v, row, live, D, HALF)

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
            g_u, g_t, weights, hidden + kept, slopes + kept, row, live, k, D, C, HIDDEN, COLUMNS, ROW_STRIDE,
            ACTIVATION, BN, BK, MLP,
        )  # fmt: skip
        g_v = g_scaled  # [BM, HALF]
        if not INVERSE:
            store_halves(map_grad + rows_of_maps, g_p, g_v, row, live, D, HALF)
            g_p, g_v = affine(g_p, g_v, scratch, row, live, A, D, HALF, True, BK, MAP)

    store_halves(grad_x + first * D, g_p, g_v, row, live, D, HALF)


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
    how: Launch | None = None,
) -> list[Tensor]:
    """∂x (B, D), ∂context (B, C) or (0,), and with `parameters` those of matrix, offset, weights and biases, in this order.

    `state` is what `flow_forward` saved (K, B, D), or with `unmatrix` (K, D, D), the inverse of `matrix`, its output
    (B, D): inputs are then rebuilt by undoing the steps. With `density`, `grad_out` holds the output z itself: the gradient
    is −z·∂logdet. All else as in `flow_forward`.
    One launch and then a batched matrix product per weight and map for every slab of rows, see WORKSPACE_BYTES.
    """
    (batch, dim), steps = grad_out.shape, len(matrix)
    widths = [w.shape[2] for w in weights[:-1]]
    context_dim = 0 if context is None else context.shape[1]
    dtype = operand_dtype(grad_out, options)
    constants = sizes(dim, widths, context_dim)
    raw = constants["COLUMNS"][-1]
    stride = row_stride(dim, raw)
    how = how or launch_for(True, dim, widths, options.mlp_precision, batch, grad_out.device)
    row_bytes = steps * (2 * stride * dtype.itemsize + (2 * dim + context_dim) * grad_out.itemsize)
    processors = _multiprocessors(grad_out.device)
    slab = how.rows * max(processors, WORKSPACE_BYTES // row_bytes // how.rows)

    grad_x = torch.empty_like(grad_out)
    grad_context = grad_out.new_empty(0) if context is None else torch.empty_like(context)
    # One workspace for all slabs: the next one's kernel runs after the products of the last.
    most = min(slab, batch)
    workspace = grad_out.new_empty(2 * steps * most * stride, dtype=dtype)
    maps = grad_out.new_empty(steps * most * dim)
    # The forward direction has its maps' inputs already where they were saved.
    given = unmatrix is None and not options.inverse
    undone = maps.new_empty(0 if given else len(maps))
    totals: list[Tensor] = []
    for first in range(0, max(batch, 1), slab):
        rows = min(slab, batch - first)
        here = slice(first, first + rows)
        hidden, slopes = workspace[: 2 * steps * rows * stride].view(2, steps, rows, stride)
        map_grad = maps[: steps * rows * dim].view(steps, rows, dim)
        map_in = state[:, here] if given else undone[: steps * rows * dim].view(steps, rows, dim)
        launch(
            flow_backward_kernel, triton.cdiv(rows, how.rows), grad_out,
            grad_out[here], grad_logdet[here], grad_x[here], state[:, here] if unmatrix is None else state[here],
            matrix, matrix if unmatrix is None else unmatrix, offset, tuple(weights), tuple(biases),
            grad_out if context is None else context[here], hidden, slopes, map_in, map_grad, int(density),
            rows, batch, steps,
            **constants, ROW_STRIDE=stride, **options.constants(), SAVED=unmatrix is None, **how.constants(),
        )  # fmt: skip

        def kept(i: int) -> Tensor:
            """Gradient of the hidden layer i before its activation, or of (u, t): (K, rows, n)."""
            start = constants["COLUMNS"][i]
            return slopes[..., start : start + weights[i].shape[2]]  # noqa: B023

        if context is not None:
            from_p = weights[0].shape[1] - context_dim
            grad_context[here] = _bmm(kept(0), weights[0][:, from_p:].mT.to(dtype)).sum(0)
        if not parameters:
            continue
        p = hidden[..., raw : raw + dim - dim // 2]
        inputs = [p] + [hidden[..., start : start + n] for start, n in zip(constants["COLUMNS"], widths)]  # noqa: B905
        products = [_over_rows(a, kept(i), processors) for i, a in enumerate(inputs)]
        if context is not None:
            of_context = _over_rows(context[here].to(dtype).expand(steps, -1, -1), kept(0), processors)
            products[0] = torch.cat([products[0], of_context], 1)
        sums = slopes.sum(1, dtype=grad_out.dtype)
        offset_grad = map_grad.sum(1)
        if options.inverse:
            offset_grad = -torch.bmm(offset_grad.unsqueeze(1), matrix.mT).squeeze(1)
        found = [
            _over_rows(map_in, map_grad, processors),
            offset_grad,
            *products,
            *(
                sums[:, start : start + len(b[0])].clone()
                for start, b in zip(constants["COLUMNS"], biases, strict=True)
            ),
        ]
        totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    return [grad_x, grad_context, *totals]


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def row_stride(dim: int, raw: int) -> int:
    """Numbers from one kept row to the next: after the hidden layers, at `raw`, come p, or (∂u, ∂t); 16 are a unit."""
    return raw + -(-max(2 * (dim // 2), dim - dim // 2) // 16) * 16


def _over_rows(a: Tensor, b: Tensor, processors: int) -> Tensor:
    """aᵀ b (K, n, m) of a (K, rows, n) and b (K, rows, m).

    A batched product works on tiles of its results, 128 × 128 of them a multiprocessor: 8 at D 64, K 8 and 32 at H 256, for
    the 132 of an H200. Where that leaves most of them idle, and rows are thousands, parts of the rows are added up.
    """
    (steps, rows, n), m = a.shape, b.shape[2]
    most = min(processors // (steps * -(-n // 128) * -(-m // 128)), rows // 1024)
    parts = 1
    while 2 * parts <= most and rows % (2 * parts) == 0:
        parts *= 2
    if parts == 1:
        return _bmm(a.mT, b)
    a, b = (t.unflatten(1, (parts, -1)).flatten(0, 1) for t in (a, b))  # (K·parts, rows/parts, …)
    return _bmm(a.mT, b).unflatten(0, (steps, parts)).sum(1)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with a float32 result, whatever the operands: float32 ones follow PyTorch's matmul precision."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else torch.bmm(a, b)


def specialization(
    name: str, dim: int, hidden: Sequence[int], context_dim: int, options: FlowOptions, saved: bool, how: Launch
) -> Specialization:
    """What `flow_backward` launches for float32 tensors."""
    constants = {**sizes(dim, hidden, context_dim), **options.constants(), "SAVED": saved}
    constants |= {"ROW_STRIDE": row_stride(dim, constants["COLUMNS"][-1])}
    constants |= {"BM": how.rows, "BN": how.columns, "BK": how.depth}
    layers = ("*fp32",) * (len(hidden) + 1)
    kept = "*bf16" if options.mlp_precision == "bf16" else "*fp32"
    signature: dict[str, Any] = dict.fromkeys(constants, "constexpr")
    for argument in flow_backward_kernel.arg_names:
        signature.setdefault(argument, "*fp32")
    signature |= {"weights": layers, "biases": layers, "hidden": kept, "slopes": kept}
    signature |= dict.fromkeys(("density", "rows", "batch", "steps"), "i32")
    return Specialization(name, flow_backward_kernel, signature, constants, how.num_warps, how.num_stages)
