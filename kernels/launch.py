"""How kernels are started, counted and listed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["Specialization", "count_launches", "launch", "specialization"]


class Specialization(NamedTuple):
    """A kernel as it is shipped, in the words of `triton.compile`: what the compile gate compiles without a GPU."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def specialization(
    name: str, kernel: Any, arguments: Sequence[Tensor | int], num_warps: int, num_stages: int, **constants: Any
) -> Specialization:
    """The kernel that `launch` starts with these arguments, whose tensors may be on "meta".

    Numbers must not be specialized: of those that are, the launcher would compile a kernel for multiples of 16, and one for 1.
    """
    signature = dict.fromkeys(constants, "constexpr")
    for argument, value in zip(kernel.arg_names, arguments, strict=False):
        signature[argument] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
    return Specialization(name, kernel, signature, constants, num_warps, num_stages)


_counters: list[list[str]] = []


@contextmanager
def count_launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched inside the `with` block."""
    names: list[str] = []
    _counters.append(names)
    try:
        yield names
    finally:
        _counters.remove(names)


def launch(kernel: Any, programs: int, device: Tensor, *args: Any, **options: Any) -> None:
    """Start `programs` programs of a kernel on the device of a tensor; none at all for an empty batch."""
    if programs == 0:
        return
    if options.get("MLP") == "bf16" and not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            "Triton's interpreter computes bfloat16 products wrongly and says nothing: interpret with float32 products "
            '(no bfloat16 autocast, torch.set_float32_matmul_precision("highest" or "high")), or use a GPU'
        )
    for names in _counters:
        names.append(kernel.__name__)
    with torch.cuda.device_of(device):
        # Fused multiply-adds in words, because Triton's default is about to change.
        kernel[(programs,)](*args, **options, enable_fp_fusion=True)
