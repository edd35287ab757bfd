"""How the backwards of whole flows divide their work: portions of rows and steps, and products over many rows."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from glf_fast.kernels.launch_table import Launch

__all__ = ["WORKSPACE_BYTES", "bmm", "multiprocessors", "over_rows", "portions"]

# What a launch may use for hidden layers and gradients: about the L2 cache of an H100 or H200 (50, 60 MB), and less than
# the saved inputs of the flow whose memory is measured (67 MB at D 64, K 64, B 4,096). At 256 MiB for all steps that flow took
# 725 MB in training, and eager 781.
WORKSPACE_BYTES = 48 << 20


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; 1 of a processor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def portions(batch: int, steps: int, row_bytes: int, how: Launch, processors: int) -> tuple[int, int]:
    """Rows and steps of one launch, whose workspace takes `row_bytes` for each row and step: WORKSPACE_BYTES if it can be.

    Rows come first, a program for every place on a multiprocessor (a wave), then as many steps as fit beside them, and where
    all steps do, further waves. A wave of a single step takes what it takes, some 24 MB at D 64, H 256.
    Programs use up to 255 registers a thread: two of 4 warps have place in 65,536, or one of 8.
    """
    wave = how.rows * processors * max(1, 8 // how.num_warps)
    rows = min(max(batch, 1), wave)
    group = min(steps, max(1, WORKSPACE_BYTES // (row_bytes * rows)))
    if group == steps:
        rows = max(rows, min(batch, WORKSPACE_BYTES // (row_bytes * steps * wave) * wave))
    slabs = triton.cdiv(max(batch, 1), rows)
    # Portions of equal size: 8 slabs of 8,192 rows, not 7 of 8,448 and a small one.
    rows = triton.cdiv(triton.cdiv(max(batch, 1), slabs), how.rows) * how.rows
    return min(rows, max(batch, 1)), triton.cdiv(steps, triton.cdiv(steps, group))


def over_rows(a: Tensor, b: Tensor, processors: int) -> Tensor:
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
        return bmm(a.mT, b)
    a, b = (t.unflatten(1, (parts, -1)).flatten(0, 1) for t in (a, b))  # (K·parts, rows/parts, …)
    return bmm(a.mT, b).unflatten(0, (steps, parts)).sum(1)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with a float32 result, whatever the operands: float32 ones follow PyTorch's matmul precision."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else torch.bmm(a, b)
