"""The elementwise affine coupling of images by ours, by plain PyTorch and by torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from bench.cases import CouplingCase
from bench.check import operation
from bench.compiler import compiled
from bench.race import Clock, Job, Provider
from glf_fast import ops, reference, use_backend

__all__ = ["PROVIDERS"]


def _job(name: str, case: CouplingCase, mode: str, clock: Clock, seed: int = 0) -> Job:
    """w and logdet, or the gradients of v, u and t; `seed` makes other tensors of the same case."""
    inputs = case.inputs(clock.DEVICE, seed)
    with torch.no_grad(), use_backend("reference"):
        gradients = [torch.randn_like(t) for t in reference.affine_coupling(*inputs)]
    job = operation(_function(name), reference.affine_coupling, inputs, gradients, mode)
    job.again = lambda: _job(name, case, mode, clock, seed + 1)
    return job


@cache
def _function(name: str) -> Callable[..., Any]:
    """One compilation for all that have the same shape."""
    if name == "glf_fast":
        return ops.affine_coupling
    return compiled(reference.affine_coupling) if name == "compile" else reference.affine_coupling


PROVIDERS = {name: Provider(name, partial(_job, name)) for name in ("glf_fast", "eager", "compile")}
