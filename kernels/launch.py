"""How kernels are started and counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["count_launches", "launch"]

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
