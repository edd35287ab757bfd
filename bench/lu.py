"""LU of batches of dense matrices, by ours and by torch.linalg."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.check import why_wrong
from bench.linear import LinearCase
from bench.race import Clock, Job, Provider
from glf_fast import ops, reference

__all__ = ["PROVIDERS", "LuCase"]


class LuCase(LinearCase):
    """As `LinearCase`, factored alone."""

    def operations(self, mode: str) -> int:
        """2/3 D³ each."""
        return super().operations(mode) // 3


def _job(function: Callable[[Tensor], Any], case: LuCase, mode: str, clock: Clock) -> Job:
    """[L and U in one (K, D, D), pivots, info]."""
    W = case.inputs(clock.DEVICE).detach()

    def check(found: Any) -> str:
        """Of P L U: pivots may differ where rounding decides between two of them."""
        P, L, U = torch.lu_unpack(found[0].double(), found[1])
        return why_wrong([P @ L @ U], [W.double()])

    ours = function is ops.lu_factor
    return Job(partial(function, W), check, alone=ours, again=partial(_job, function, case, mode, clock))


PROVIDERS = {
    "glf_fast": Provider("glf_fast", partial(_job, ops.lu_factor)),
    "torch.linalg": Provider("torch.linalg", partial(_job, reference.lu_factor)),
}
