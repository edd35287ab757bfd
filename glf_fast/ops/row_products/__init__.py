"""Gradients of weights and biases of many layers and steps in one launch: csrc/cuda/row_products.cuh.

An operation without a derivative, for the backwards of whole flows. It has no reference: where it is not usable, they take
batched matrix products and sums (kernels/weight_gradients.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.backends import CUDA, CUPY, usable

__all__ = ["ready"]

# In every step products[i] (steps, n_in, n_out) becomes x[i]ᵀ g[i] of x[i] (steps, rows, n_in) and g[i] (steps, rows, n_out).
# sums[i] (steps, n_out), unless it is (0,), becomes the sums of g[i]'s columns. With `accumulate` results are added to theirs.
# Rows are float32, multiplied as three tf32 products (operands 0) or as one (1), or they are bf16 (2); results are float32.
# Numbers of a row are neighbours, and rows of bf16 begin at multiples of four bytes. Rows are added up in `parts`.
_library = torch.library.Library("glf_fast", "FRAGMENT")
_library.define(
    "row_products(Tensor[] x, Tensor[] g, int[] operands, Tensor(a!)[] products, Tensor(b!)[] sums, bool accumulate, "
    "int parts) -> ()"
)

if CUPY:  # the CUDA kernels through CuPy, where they are not compiled
    from glf_fast.ops.row_products import cupy

    _cupy = torch.library.Library("glf_fast", "IMPL")
    cupy.register(_cupy)


@torch.library.register_fake("glf_fast::row_products")
def _(
    x: list[Tensor], g: list[Tensor], operands: list[int], products: list[Tensor], sums: list[Tensor], accumulate: bool,
    parts: int,
) -> None:  # fmt: skip
    return None


def ready(x: Tensor) -> bool:
    """Whether the operation runs on the device of a float32 tensor, under the backend that is chosen now."""
    if x.device.type != "cuda" or x.dtype != torch.float32 or CUDA.missing:
        return False
    # An older library may be there, which has linear layers alone; and older GPUs have no such matrix units.
    there = torch._C._dispatch_has_kernel_for_dispatch_key("glf_fast::row_products", "CUDA")
    return there and usable(CUDA, x) and torch.cuda.get_device_capability(x.device) >= (8, 0)
