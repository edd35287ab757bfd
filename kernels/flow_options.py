"""What the launchers of the flow kernels share: options, and the sizes that kernels know at compile time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["FULL_PRECISION", "FlowOptions", "operand_dtype", "sizes"]

# Full float32 as three tf32 products, at a third of the matrix units' rate. "ieee" has no matrix units at all, and spills: 632
# bytes at D 64, H 256, BM 16 with 255 registers, where this one takes 168 and none (sm_90, compiled only; not measured).
FULL_PRECISION = "tf32x3"


class FlowOptions(NamedTuple):
    """Options of a flow, by the names that `glf_fast.reference` uses.

    `constant` of the log-scale (ln m for softclip). Precisions of the operands of products, of the affine maps ("ieee",
    "tf32x3", "tf32") and of the MLPs (these and "bf16"); everything else is in the dtype of the state.
    """

    activation: str
    log_scale: str
    constant: float
    add_first: bool
    inverse: bool
    map_precision: str
    mlp_precision: str

    def constants(self) -> dict[str, Any]:
        """As compile-time constants of the kernels."""
        return {
            "ACTIVATION": self.activation,
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


def sizes(dim: int, hidden: Sequence[int], context_dim: int) -> dict[str, Any]:
    """Compile-time sizes of a flow's kernels.

    COLUMNS: where each hidden layer starts in a row of them, and where the last one ends. ROW_STRIDE: numbers from one row
    to the next in the backward's workspace, where [p, context] or [∂u, ∂t] follow the hidden layers. WEIGHTS and VECTORS:
    where each matrix of an MLP and each vector starts in a packed step (packing.py), and how long a step is. Layers are
    padded to multiples of 16 numbers, which a matrix unit multiplies at once, and which are aligned for whatever reads them.
    """
    half = max(16, triton.next_power_of_2(dim - dim // 2))
    padded = [-(-n // 16) * 16 for n in hidden]
    rows = [half + -(-context_dim // 16) * 16, *padded]
    columns = [*padded, 2 * half]
    return {
        "D": dim,
        "HALF": half,
        "C": context_dim,
        "HIDDEN": tuple(hidden),
        "COLUMNS": (0, *accumulate(padded)),
        "ROW_STRIDE": sum(padded) + -(-max(2 * (dim // 2), dim - dim // 2 + context_dim) // 16) * 16,
        "WEIGHTS": (0, *accumulate(n * m for n, m in zip(rows, columns, strict=True))),
        "VECTORS": (0, *accumulate([2 * half, *columns, 16])),
    }
