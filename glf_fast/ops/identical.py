"""Whether tensors still hold what copies of them hold: what a cache has to ask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glf_fast.ops.backends import CPP, usable

__all__ = ["identical"]


def identical(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    """Whether tensors hold the same values as their contiguous copies, one by one.

    The kernels compare bytes, and those of contiguous tensors only: any other is not identical to its copy.

    Values are compared, not version counters, which fused optimizers and writes through `.data` leave as they are.
    The half megabyte of a D = 64, K = 8 flow takes 10 µs; torch.equal, tensor by tensor, takes 40.
    """
    if usable(CPP, tensors[0]):
        return torch.ops.glf_fast.cpu_identical.default(tensors, copies)
    return all(t.dtype == c.dtype and torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))
