"""A GPU's matrix units in arithmetic: what full precision in three tf32 products loses where sums are truncated.

Kernels compute a float32 product as a_lo b_hi + a_hi b_lo + a_hi b_hi, a = a_hi + a_lo in tf32 numbers ("tf32x3"). Matrix
units add eight products at a time to a float32 accumulator and truncate the sum toward zero, where a fused multiply-add
rounds (Ootomo and Yokota, arXiv:2203.03341, of V100 to A100; the width of an H100's accumulator is assumed to be the same).
Truncation is biased: over n additions its errors add up to n/2 units in the last place, rounding's to √n/√12. The longer a
sum is before it leaves the unit, the more it loses: a chunk's sum is added to the chunks before it with rounding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DEPTH", "TruncatingUnits"]

# The longest sum that a launch leaves in a matrix unit: a first hidden layer of 256 that is kept, or a chunk of a longer one.
DEPTH = 256

aten = torch.ops.aten


def _truncate(x: Tensor) -> Tensor:
    """Float64 to float32, toward zero."""
    rounded = x.float()
    return torch.where(rounded.double().abs() > x.abs(), rounded.nextafter(torch.zeros(())), rounded)


def _tf32(x: Tensor) -> Tensor:
    """Rounded to tf32's 10 bits."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _multiply_add(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, eight products at a time."""
    for k in range(0, a.shape[-1], 8):
        total = _truncate(total.double() + a[..., k : k + 8].double() @ b[..., k : k + 8, :].double())
    return total


class TruncatingUnits(TorchDispatchMode):
    """Inside, float32 matrix products come from three tf32 products in truncating units, `depth` of a sum at a time.

    Sums over `rows` stay as they are: gradients of weights are torch's products, not the kernels'.
    """

    def __init__(self, depth: int, rows: int) -> None:
        super().__init__()
        self.depth, self.rows, self.products = depth, rows, 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        added = function in (aten.addmm.default, aten.baddbmm.default)
        if added or function in (aten.mm.default, aten.bmm.default):
            *start, a, b = args
            if a.dtype == torch.float32 and a.shape[-1] != self.rows:
                self.products += 1
                product = self._product(a, b)
                return start[0] + product if added else product
        return function(*args, **(kwargs or {}))

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(*a.shape[:-1], b.shape[-1])
        for k in range(0, a.shape[-1], self.depth):
            a_part, b_part = a[..., k : k + self.depth], b[..., k : k + self.depth, :]
            a_high, b_high = _tf32(a_part), _tf32(b_part)
            chunk = _multiply_add(torch.zeros_like(total), _tf32(a_part - a_high), b_high)
            chunk = _multiply_add(chunk, a_high, _tf32(b_part - b_high))
            total = total + _multiply_add(chunk, a_high, b_high)
        return total
