"""The CUDA kernels of small and medium coupling flows without nvcc: NVRTC compiles csrc/cuda at first use, through CuPy.

The same device code, launched as csrc/cuda/flow.cu and cluster_flow.cu do it. A kernel is compiled for a precision, and for a
small flow's padded sizes or a size of clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from glf_fast.ops.coupling_flow import cluster
from glf_fast.ops.coupling_flow.small import ACTIVATIONS, LOG_SCALES, MOST_LAYERS, FlowShape, Options, unit_bytes
from glf_fast.ops.linear import cupy as cupy_linear

__all__ = ["CLUSTER_KERNELS", "CLUSTER_SOURCE", "KERNELS", "SOURCE", "pack", "run"]

SOURCE = '#include "flow_kernels.cuh"\n'
CLUSTER_SOURCE = '#include "cluster_kernels.cuh"\n'
# csrc/cuda/flow_call.cuh, stream.cuh, flow_kernels.cuh and cluster_kernels.cuh have these, too.
MOST_WARPS, WARP_ROWS, PACK_THREADS, STEP_SLOTS, CLUSTER_SLOTS, BARRIER_BYTES = 8, 16, 256, 3, 4, 64
CLUSTER_THREADS = 256
FORTH = 1
# The combinations that csrc/cuda/flow.cu compiles: tiles of a half and of hidden layers, precisions of maps and of MLPs.
PRECISIONS = ((0, 0), (1, 1), (0, 2))
KINDS = tuple(f"{half}, 8, {map}, {mlp}" for half in (1, 2) for map, mlp in PRECISIONS)
KERNELS = (
    "glf::device::flow_pack_kernel",
    *(f"glf::device::flow_forward_kernel<{kind}, {inverse}>" for kind in KINDS for inverse in ("false", "true")),
    *(f"glf::device::flow_gradient_kernel<{kind}>" for kind in KINDS),
)
# By precisions and blocks of a cluster, which are as many as every GPU with clusters allows.
CLUSTERS = tuple(f"{map}, {mlp}, 8" for map, mlp in PRECISIONS)
CLUSTER_KERNELS = (
    "glf::device::cluster_pack_kernel",
    *(f"glf::device::cluster_forward_kernel<{kind}, {inverse}>" for kind in CLUSTERS for inverse in ("false", "true")),
    *(f"glf::device::cluster_gradient_kernel<{kind}>" for kind in CLUSTERS),
)

SHAPE = np.dtype(
    [(name, np.int32) for name in ("steps", "dim", "context", "layers")]
    + [("hidden", np.int32, (MOST_LAYERS,))]
    + [(name, np.int32) for name in ("half_tiles", "hidden_tiles", "map", "mlp", "blocks")]
)
PARAMETERS = np.dtype(
    [(name, np.uint64) for name in ("matrix", "offset", "logabsdet")]
    + [("logs", np.int32)]
    + [(name, np.uint64, (MOST_LAYERS + 1,)) for name in ("weights", "biases")],
    align=True,
)
POINTERS = ("packed", "transposed", "x", "context", "out", "logdet")
KEPT = (
    "map_in",
    "map_grad",
    "hidden",
    "derivatives",
    "slopes",
    "record",
    "grad_out",
    "grad_logdet",
    "grad_x",
    "grad_context",
)
CALL = np.dtype(
    [("shape", SHAPE), ("activation", np.int32), ("log_scale", np.int32), ("constant", np.float32)]
    + [(name, np.int32) for name in ("add_first", "density", "slots", "warps")]
    + [("rows", np.int64)]
    + [(name, np.uint64) for name in POINTERS]
    + [("stride", np.int32)]
    + [(name, np.uint64) for name in KEPT],
    align=True,
)


def _shape(s: FlowShape) -> np.ndarray:
    """FlowShape, as kernels take it: by value."""
    padded = (*s.hidden, *[0] * (MOST_LAYERS - len(s.hidden)))
    return np.array(
        [(s.steps, s.dim, s.context, len(s.hidden), padded, s.half_tiles, s.hidden_tiles, s.map, s.mlp, s.blocks)],
        SHAPE,
    )


def pack(
    s: FlowShape, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None, weights: Sequence[Tensor],
    biases: Sequence[Tensor], packed: Tensor, transposed: Tensor | None,
) -> None:  # fmt: skip
    """`glf_fast::cuda_flow_pack`."""
    address = cupy_linear.pointer
    padding = [0] * (MOST_LAYERS + 1 - len(weights))
    given = (
        *(address(t, matrix) for t in (matrix, offset, logabsdet)), 0 if logabsdet is None else logabsdet.numel(),
        [*(address(w, matrix) for w in weights), *padding], [*(address(b, matrix) for b in biases), *padding],
    )  # fmt: skip
    forward_bytes, back_bytes = unit_bytes(s)
    blocks = -(-(forward_bytes + (0 if transposed is None else back_bytes)) // (16 * PACK_THREADS))
    arguments = (_shape(s), np.array([given], PARAMETERS), address(packed, matrix), address(transposed, matrix))
    name, source = ("flow", SOURCE) if s.blocks == 1 else ("cluster", CLUSTER_SOURCE)
    kernel = f"glf::device::{name}_pack_kernel"
    cupy_linear.launch(kernel, matrix.device, s.steps * blocks, PACK_THREADS, 0, arguments, source)


def run(s: FlowShape, options: Options, ways: int, stride: int, like: Tensor, **tensors: Tensor | None) -> None:
    """`glf_fast::cuda_flow_run`."""
    (_run_clusters if s.blocks > 1 else _run_warps)(s, options, ways, like, _call(s, options, stride, like, tensors))


def _call(s: FlowShape, options: Options, stride: int, like: Tensor, tensors: dict[str, Tensor | None]) -> np.ndarray:
    """FlowCall, but for its warps and slots."""
    call = np.zeros(1, CALL)
    call["shape"] = _shape(s)
    call["activation"], call["log_scale"] = ACTIVATIONS[options.activation], LOG_SCALES[options.log_scale]
    call["constant"], call["add_first"], call["density"] = options.constant, options.add_first, options.density
    call["rows"], call["stride"] = len(like), stride
    for name, tensor in tensors.items():
        # hidden and slopes, which are cut from a buffer of the right type and length, may be bfloat16.
        half = tensor is not None and tensor.dtype == torch.bfloat16
        call[name] = tensor.data_ptr() if half and tensor is not None else cupy_linear.pointer(tensor, like)
    return call


def _run_warps(s: FlowShape, options: Options, ways: int, like: Tensor, call: np.ndarray) -> None:
    """As many warps a block as spread the rows over the GPU, as many slots as there is room for."""
    forward_bytes, back_bytes = unit_bytes(s)
    slot = forward_bytes if ways <= FORTH else back_bytes if ways == FORTH + 1 else max(forward_bytes, back_bytes)
    warps_of_rows = -(-len(like) // WARP_ROWS)
    warps = min(MOST_WARPS, -(-warps_of_rows // cupy_linear.multiprocessors(like.device)))
    slots = min(STEP_SLOTS, (cupy_linear.most_shared(like.device) - BARRIER_BYTES) // slot)
    if slots < 2:
        raise RuntimeError("glf_fast: the weights of two steps do not fit into shared memory")
    call["slots"], call["warps"] = slots, warps
    sizes = f"{s.half_tiles}, {s.hidden_tiles}, {s.map}, {s.mlp}"
    forward = f"flow_forward_kernel<{sizes}, {str(options.inverse).lower()}>"
    kernel = f"glf::device::{f'flow_gradient_kernel<{sizes}>' if ways else forward}"
    more = (np.int32(ways),) if ways else ()
    shared = BARRIER_BYTES + slots * slot
    cupy_linear.launch(kernel, like.device, -(-warps_of_rows // warps), 32 * warps, shared, (call, *more), SOURCE)


def _run_clusters(s: FlowShape, options: Options, ways: int, like: Tensor, call: np.ndarray) -> None:
    """A cluster for sixteen rows, and as many slots as there is room for."""
    room = cupy_linear.most_shared(like.device) - cluster.shared_bytes(s, 0)
    slots = min(CLUSTER_SLOTS, room // cluster.slot_bytes(s))
    if slots < 2:
        raise RuntimeError("glf_fast: two units of weights do not fit into shared memory")
    call["slots"] = slots
    kind = f"{s.map}, {s.mlp}, {s.blocks}"
    forward = f"cluster_forward_kernel<{kind}, {str(options.inverse).lower()}>"
    kernel = f"glf::device::{f'cluster_gradient_kernel<{kind}>' if ways else forward}"
    more = (np.int32(ways),) if ways else ()
    grid, shared = -(-len(like) // WARP_ROWS) * s.blocks, cluster.shared_bytes(s, slots)
    cupy_linear.launch(kernel, like.device, grid, CLUSTER_THREADS, shared, (call, *more), CLUSTER_SOURCE)
