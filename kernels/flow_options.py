"""What the launchers of the flow kernels share: options, and the sizes that kernels know at compile time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from glf_fast.kernels.spline import padded_bins

__all__ = ["FULL_PRECISION", "FlowOptions", "operand_dtype", "sizes"]

# Full float32 as three tf32 products, at a third of the matrix units' rate. "ieee" has no matrix units at all, and spills: 632
# bytes at D 64, H 256, BM 16 with 255 registers, where this one takes 168 and none (sm_90, compiled only; not measured).
FULL_PRECISION = "tf32x3"


class FlowOptions(NamedTuple):
    """Options of a flow, by the names that `glf_fast.reference` uses.

    `constant` of the log-scale (ln m for softclip). Precisions of the operands of products, of the affine maps ("ieee",
    "tf32x3", "tf32") and of the MLPs (these and "bf16"); everything else is in the dtype of the state. `spline`, the constants
    of the kernels' splines (spline.py), is empty for affine couplings; it is one of the `sizes`. `activation_constant` is 0
    for an activation that has none.
    """

    activation: str
    log_scale: str
    constant: float
    add_first: bool
    inverse: bool
    map_precision: str
    mlp_precision: str
    spline: tuple[Any, ...] = ()
    activation_constant: float = 0.0

    def constants(self) -> dict[str, Any]:
        """As compile-time constants of the kernels."""
        return {
            "ACTIVATION": (self.activation, self.activation_constant),
            "LOG_SCALE": self.log_scale,
            "CONSTANT": self.constant,
            "ADD_FIRST": self.add_first,
            "INVERSE": self.inverse,
            "MAP": self.map_precision,
            "MLP": self.mlp_precision,
        }


def operand_dtype(x: Tensor, options: FlowOptions) -> torch.dtype:
    """In what hidden layers and their gradients are kept: nothing is lost that a product would use."""
    return torch.bfloat16 if options.mlp_precision == "bf16" else x.dtype


def sizes(
    dim: int, hidden: Sequence[int], context_dim: int, spline: tuple[Any, ...] = (), backward: bool = False
) -> dict[str, Any]:
    """Compile-time sizes of a flow's kernels.

    COLUMNS: where each hidden layer starts in a row of them, and where the last one ends. ROW_STRIDE: numbers from one row
    to the next in the backward's workspace, where [p, context] or the N_RAW gradients of the last layer's numbers follow the
    hidden layers. WEIGHTS and VECTORS: where each matrix of an MLP and each vector starts in a packed step (packing.py), and
    how long a step is; the `backward` of splines has the last matrix twice. Layers are padded to multiples of 16 numbers,
    which a matrix unit multiplies at once, and which are aligned for whatever reads them.
    """
    half = max(16, triton.next_power_of_2(dim - dim // 2))
    padded = [_up(n) for n in hidden]
    rows = [half + _up(context_dim), *padded]
    columns = [*padded, 2 * half]
    raw = 2 * (dim // 2)
    if spline:
        bins, tails, *_ = spline
        raw = (3 * bins + tails) * (dim // 2)
        columns[-1] = _up(dim // 2) * (2 * padded_bins(bins) + padded_bins(bins + tails))
    vectors = [2 * half, *columns, 16]
    if spline and backward:
        rows.append(rows[-1])
        columns.append(_up(raw))
    return {
        "D": dim,
        "HALF": half,
        "C": context_dim,
        "HIDDEN": tuple(hidden),
        "COLUMNS": (0, *accumulate(padded)),
        "ROW_STRIDE": sum(padded) + _up(max(raw, dim - dim // 2 + context_dim)),
        "WEIGHTS": (0, *accumulate(n * m for n, m in zip(rows, columns, strict=True))),
        "VECTORS": (0, *accumulate(vectors)),
        "N_RAW": raw,
        "SPLINE": spline,
    }


def _up(n: int) -> int:
    return -(-n // 16) * 16
