"""The CUDA kernels of small coupling flows without nvcc: NVRTC compiles csrc/cuda at first use, through CuPy.

The same device code, launched as csrc/cuda/flow.cu does it. A kernel is compiled for the padded sizes and the precision of a flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glf_fast.ops.linear import cupy as cupy_linear

__all__ = ["SOURCE", "FlowShape", "Options", "density_gradient", "forward", "unit_bytes"]

SOURCE = '#include "flow_kernels.cuh"\n'
# csrc/cuda/flow_call.cuh has these, too.
MOST_LAYERS, MOST_WARPS, WARP_ROWS, PACK_THREADS, MOST_SLOTS, BARRIER_BYTES = 4, 8, 16, 256, 3, 64
DEPTHS = (8, 16, 32)  # rows of a weight in a block of 512 bytes: of tf32x3, tf32, bf16
FORTH, BACK = 1, 2

SHAPE = np.dtype(
    [(name, np.int32) for name in ("steps", "dim", "context", "layers")]
    + [("hidden", np.int32, (MOST_LAYERS,))]
    + [(name, np.int32) for name in ("half_tiles", "hidden_tiles", "map", "mlp")]
)
PARAMETERS = np.dtype(
    [(name, np.uint64) for name in ("matrix", "offset", "logabsdet")]
    + [("logs", np.int32)]
    + [(name, np.uint64, (MOST_LAYERS + 1,)) for name in ("weights", "biases")],
    align=True,
)
CALL = np.dtype(
    [("shape", SHAPE), ("activation", np.int32), ("log_scale", np.int32), ("constant", np.float32)]
    + [(name, np.int32) for name in ("add_first", "density", "slots", "warps")]
    + [("rows", np.int64)]
    + [(name, np.uint64) for name in ("packed", "transposed", "x", "context", "out", "logdet")]
    + [("stride", np.int32)]
    + [
        (name, np.uint64)
        for name in (
            "map_in", "map_grad", "hidden", "slopes", "record", "grad_out", "grad_logdet", "grad_x", "grad_context",
        )
    ],
    align=True,
)  # fmt: skip


class FlowShape(NamedTuple):
    """Sizes of a flow, and the numbers of its precisions: 0 float32 by three tf32 products, 1 tf32, 2 bfloat16."""

    steps: int
    dim: int
    context: int
    hidden: tuple[int, ...]
    map: int
    mlp: int

    @property
    def half_tiles(self) -> int:
        """Tiles of 8 columns to which each half of a row is padded."""
        return 1 if self.dim <= 16 else 2

    @property
    def hidden_tiles(self) -> int:
        """Tiles of 8 columns to which hidden layers are padded."""
        return 8

    @property
    def stride(self) -> int:
        """Numbers from one row of the workspace to the next; kernels/flow_options.py has the same."""
        passive = self.dim - self.dim // 2
        return sum(map(_up, self.hidden)) + _up(max(2 * (self.dim // 2), passive + self.context))

    def array(self) -> np.ndarray:
        """As kernels take it, by value."""
        padded = (*self.hidden, *[0] * (MOST_LAYERS - len(self.hidden)))
        numbers = (self.steps, self.dim, self.context, len(self.hidden), padded, self.half_tiles, self.hidden_tiles)
        return np.array([(*numbers, self.map, self.mlp)], SHAPE)


class Options(NamedTuple):
    """Options of a call, by the numbers of csrc/cuda/flow_math.cuh."""

    activation: int
    log_scale: int
    constant: float
    add_first: bool
    inverse: bool
    density: bool


def _up(n: int) -> int:
    return -(-n // 16) * 16


def unit_bytes(s: FlowShape) -> tuple[int, int]:
    """Bytes of a packed step: the forward's, and the transposed one of the backward (`Layout`, csrc/cuda/flow_call.cuh)."""

    def quads(precision: int, rows: int, tiles: int) -> int:
        return -(-rows // DEPTHS[precision]) * tiles * 32

    halves, hidden, inner = 2 * s.half_tiles, s.hidden_tiles, len(s.hidden) - 1
    square = inner * quads(s.mlp, 8 * hidden, hidden) + quads(s.map, 8 * halves, halves)
    forward = 4 * halves + 1 + square + quads(s.mlp, 8 * s.half_tiles, hidden) + quads(s.mlp, 8 * hidden, halves)
    forward += 2 * hidden * len(s.hidden) + quads(s.mlp, s.context, hidden)
    back = square + quads(s.mlp, 8 * halves, hidden) + quads(s.mlp, 8 * hidden, s.half_tiles)
    return 16 * forward, 16 * (back + quads(s.mlp, 8 * hidden, -(-s.context // 8)))


def _pack(
    s: FlowShape, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None, weights: Sequence[Tensor],
    biases: Sequence[Tensor], back: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    forward_bytes, back_bytes = unit_bytes(s)
    packed = matrix.new_empty(s.steps * forward_bytes // 4)
    transposed = matrix.new_empty(s.steps * back_bytes // 4) if back else None
    point = cupy_linear.pointer
    padding = [0] * (MOST_LAYERS + 1 - len(weights))
    given = (
        *(point(t, matrix) for t in (matrix, offset, logabsdet)), 0 if logabsdet is None else logabsdet.numel(),
        [*(point(w, matrix) for w in weights), *padding], [*(point(b, matrix) for b in biases), *padding],
    )  # fmt: skip
    blocks = -(-(forward_bytes + (back_bytes if back else 0)) // 16 // PACK_THREADS)
    arguments = (s.array(), np.array([given], PARAMETERS), point(packed, matrix), point(transposed, matrix))
    cupy_linear.launch("glf::device::flow_pack_kernel", matrix.device, s.steps * blocks, PACK_THREADS, 0, arguments, SOURCE)
    return packed, transposed


def _launch(
    kernel: str, s: FlowShape, options: Options, like: Tensor, slot_bytes: int, *more: Any, **tensors: Tensor | None
) -> None:
    """One kernel on all rows: as many warps a block as spread the rows over the whole GPU, and as many slots as there is room."""
    warps_of_rows = -(-len(like) // WARP_ROWS)
    warps = min(MOST_WARPS, max(1, -(-warps_of_rows // cupy_linear.multiprocessors(like.device))))
    room = cupy_linear.most_shared(like.device)
    slots = min(MOST_SLOTS, (room - BARRIER_BYTES) // slot_bytes)
    call = np.zeros(1, CALL)
    call["shape"] = s.array()
    for name in ("activation", "log_scale", "constant", "add_first", "density"):
        call[name] = getattr(options, name)
    call["slots"], call["warps"], call["rows"], call["stride"] = slots, warps, len(like), s.stride
    for name, tensor in tensors.items():
        call[name] = cupy_linear.pointer(tensor, like) if tensor is None or tensor.dtype != torch.bfloat16 else tensor.data_ptr()
    shared = BARRIER_BYTES + slots * slot_bytes
    cupy_linear.launch(f"glf::device::{kernel}", like.device, -(-warps_of_rows // warps), 32 * warps, shared, (call, *more), SOURCE)


def _sizes(s: FlowShape) -> str:
    return f"{s.half_tiles}, {s.hidden_tiles}, {s.map}, {s.mlp}"


def forward(
    s: FlowShape, options: Options, x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None,
    weights: Sequence[Tensor], biases: Sequence[Tensor], context: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and logdet."""
    out, logdet = torch.empty_like(x), x.new_empty(len(x))
    if not len(x):
        return out, logdet
    packed, _ = _pack(s, matrix, offset, logabsdet, weights, biases, False)
    name = f"flow_forward_kernel<{_sizes(s)}, {str(options.inverse).lower()}>"
    _launch(name, s, options, x, unit_bytes(s)[0], packed=packed, x=x, context=context, out=out, logdet=logdet)
    return out, logdet


class Workspace(NamedTuple):
    """What a forward leaves to the backward, and both to the gradients of parameters."""

    transposed: Tensor  # packed parameters of the backward
    record: Tensor  # v, u and t of each step in the order of the warps' registers
    hidden: Tensor  # (K, B, stride), hidden layers and [p, context], in the type of the MLP's operands
    slopes: Tensor  # (K, B, stride), their gradients before activation and [∂u, ∂t]
    map_in: Tensor  # (K, B, D), what the affine maps were applied to
    map_grad: Tensor  # (K, B, D), the gradient of what they returned


def _workspace(s: FlowShape, x: Tensor, transposed: Tensor) -> Workspace:
    rows, dtype = len(x), torch.bfloat16 if s.mlp == 2 else x.dtype
    record = x.new_empty(s.steps * -(-rows // WARP_ROWS) * 3 * s.half_tiles * 128)
    layers = [x.new_empty(s.steps, rows, s.stride, dtype=dtype) for _ in range(2)]
    maps = [x.new_empty(s.steps, rows, s.dim) for _ in range(2)]
    return Workspace(transposed, record, *layers, *maps)


def forward_and_keep(
    s: FlowShape, options: Options, x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None,
    weights: Sequence[Tensor], biases: Sequence[Tensor], context: Tensor | None,
) -> tuple[Tensor, Tensor, Workspace]:  # fmt: skip
    """Output, logdet, and what `backward` needs."""
    return _both(s, options, x, matrix, offset, logabsdet, weights, biases, context, FORTH)[:3]


def density_gradient(
    s: FlowShape, options: Options, x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None,
    weights: Sequence[Tensor], biases: Sequence[Tensor], context: Tensor | None, grad_logdet: Tensor | None,
) -> tuple[Tensor, Tensor, Workspace, Tensor, Tensor | None]:  # fmt: skip
    """Output, density, workspace, ∂x and ∂context, given ∂density (B,), or 1 for each row. One launch behind the packing."""
    assert options.density and not options.inverse
    return _both(s, options, x, matrix, offset, logabsdet, weights, biases, context, FORTH | BACK, grad_logdet)


def _both(
    s: FlowShape, options: Options, x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None,
    weights: Sequence[Tensor], biases: Sequence[Tensor], context: Tensor | None, ways: int,
    grad_logdet: Tensor | None = None,
) -> tuple[Tensor, Tensor, Workspace, Tensor, Tensor | None]:  # fmt: skip
    packed, transposed = _pack(s, matrix, offset, logabsdet, weights, biases, True)
    assert transposed is not None
    out, logdet = torch.empty_like(x), x.new_empty(len(x))
    made = _workspace(s, x, transposed)
    grad_x, grad_context = torch.empty_like(x), None if context is None else torch.empty_like(context)
    slot = max(unit_bytes(s)) if ways & BACK else unit_bytes(s)[0]
    _launch(
        f"flow_gradient_kernel<{_sizes(s)}>", s, options, x, slot, np.int32(ways), packed=packed, x=x, context=context,
        out=out, logdet=logdet, grad_logdet=grad_logdet, grad_x=grad_x, grad_context=grad_context, **made._asdict(),
    )  # fmt: skip
    return out, logdet, made, grad_x, grad_context


def backward(
    s: FlowShape, options: Options, kept: Workspace, grad_out: Tensor | None, grad_logdet: Tensor, out: Tensor,
    context: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """∂x and ∂context; completes the workspace. Without `grad_out`, of a density, from its output."""
    grad_x, grad_context = torch.empty_like(out), None if context is None else torch.empty_like(context)
    _launch(
        f"flow_gradient_kernel<{_sizes(s)}>", s, options, out, unit_bytes(s)[1], np.int32(BACK), out=out,
        grad_out=grad_out, grad_logdet=grad_logdet, grad_x=grad_x, grad_context=grad_context, **kept._asdict(),
    )  # fmt: skip
    return grad_x, grad_context
