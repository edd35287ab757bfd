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
from glf_fast.ops.coupling_flow.training_step import Rows, Update
from glf_fast.ops.linear import cupy as cupy_linear

__all__ = [
    "CLUSTER_KERNELS",
    "CLUSTER_SOURCE",
    "KERNELS",
    "SOURCE",
    "UPDATE_KERNELS",
    "UPDATE_SOURCE",
    "batch",
    "pack",
    "run",
    "update",
]

SOURCE = '#include "flow_kernels.cuh"\n'
CLUSTER_SOURCE = '#include "cluster_kernels.cuh"\n'
UPDATE_SOURCE = '#include "flow_update.cuh"\n'
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
UPDATE_KERNELS = tuple(f"glf::device::flow_{name}_kernel" for name in ("batch", "gradients", "update"))
# flow_trained.cuh has these.
UPDATE_THREADS, EIGHTHS_BYTES = 256, 32
WEIGHTS, BIASES, PLACES = 5, 6 + MOST_LAYERS, 7 + 2 * MOST_LAYERS
BATCH = np.dtype(
    [(name, np.uint64) for name in ("order", "made", "x", "context", "weights")]
    + [("rows", np.int64)]
    + [(name, np.int32) for name in ("batch", "dim", "columns")]
    + [(name, np.uint64) for name in ("to_x", "to_context", "slopes")],
    align=True,
)
TRAINED = np.dtype([(name, np.uint64) for name in ("value", "grad", "mean", "square", "count")])
UPDATE = np.dtype(
    [
        ("shape", SHAPE),
        ("permutation", np.uint64),
        ("sign", np.uint64),
        ("of", TRAINED, (PLACES,)),
        ("given", PARAMETERS),
    ]
    + [(name, np.uint64) for name in ("matrix", "offset", "logabsdet", "grad_matrix", "grad_offset", "grad_logabsdet")]
    + [
        ("networks", np.uint64),
        ("numbers", np.int64),
        ("log_prob", np.uint64),
        ("slopes", np.uint64),
        ("batch", np.int32),
    ]
    + [("squares", np.uint64), ("factors", np.uint64), ("beta1", np.float64), ("beta2", np.float64)]
    + [(name, np.float32) for name in ("epsilon", "weight_decay", "clip")]
    + [(name, np.uint64) for name in ("rates", "losses", "made", "packed", "transposed")],
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


def batch(order: Tensor, made: Tensor | None, rows: Rows, x: Tensor, context: Tensor | None, slopes: Tensor) -> None:
    """`glf_fast::cuda_flow_batch`."""
    columns = 0 if context is None else context.shape[1]
    given = np.zeros(1, BATCH)
    given["rows"], given["batch"], given["dim"], given["columns"] = len(rows.x), len(x), x.shape[1], columns
    tensors = {"order": order, "made": made, **rows._asdict(), "to_x": x, "to_context": context, "slopes": slopes}
    for name, tensor in tensors.items():
        given[name] = cupy_linear.pointer(tensor, x)
    blocks = -(-len(x) * (x.shape[1] + columns + 1) // UPDATE_THREADS)
    if len(x):
        cupy_linear.launch(UPDATE_KERNELS[0], x.device, blocks, UPDATE_THREADS, 0, (given,), UPDATE_SOURCE)


def update(s: FlowShape, u: Update) -> None:
    """`glf_fast::cuda_flow_update`."""
    like, layers = u.gradients, len(s.hidden) + 1
    given = np.zeros(1, UPDATE)
    given["shape"], given["batch"] = _shape(s), len(u.slopes)
    of_maps = len(u.parameters) - 2 * layers  # 3, or 5 with ActNorms
    places = [*range(of_maps), *range(WEIGHTS, WEIGHTS + layers), *range(BIASES, BIASES + layers)]
    at = 0
    for i, (place, (value, mean, square, count)) in enumerate(zip(places, u.parameters, strict=True)):
        if i == of_maps:
            given["networks"], given["numbers"] = like.data_ptr() + 4 * at, like.numel() - at
        gradient = like.data_ptr() + 4 * at
        pointers = [cupy_linear.pointer(t.detach(), like) for t in (value, mean, square, count)]
        given["of"][0, place] = (pointers[0], gradient, *pointers[1:])
        at += value.numel()
    parameters = given["given"][0]
    for name, place in (("weights", WEIGHTS), ("biases", BIASES)):
        parameters[name][:layers] = given["of"]["value"][0, place : place + layers]
    parameters["logs"] = s.steps
    for name, tensor, grad in zip(("matrix", "offset", "logabsdet"), u.maps, u.map_gradients, strict=True):
        given[name] = parameters[name] = cupy_linear.pointer(tensor, like)
        given[f"grad_{name}"] = cupy_linear.pointer(grad, like)
    for name in ("permutation", "sign", "log_prob", "slopes", "packed", "transposed"):
        given[name] = cupy_linear.pointer(getattr(u, name), like)
    for name in ("rates", "losses", "made"):
        given[name] = cupy_linear.pointer(getattr(u.progress, name), like)
    given["factors"], given["squares"] = u.scratch.data_ptr(), u.scratch.data_ptr() + 16
    given["beta1"], given["beta2"] = u.by.betas
    given["epsilon"], given["weight_decay"], given["clip"] = u.by[1:]
    shared = (
        EIGHTHS_BYTES + cupy_linear.plu_backward_bytes(s.dim, like.dtype),
        EIGHTHS_BYTES + cupy_linear.plu_assemble_bytes(s.dim, 4),
    )
    blocks = u.scratch.numel() - 4, s.steps * (layers + 1)
    for name, grid, size in zip(UPDATE_KERNELS[1:], blocks, shared, strict=True):
        cupy_linear.launch(name, like.device, grid, UPDATE_THREADS, size, (given,), UPDATE_SOURCE)
