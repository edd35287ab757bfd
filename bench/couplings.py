"""The elementwise affine coupling of images by ours, by plain PyTorch and by torch.compile, on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.cases import CouplingCase
from bench.check import why_wrong
from bench.compiler import compiled
from glf_fast import ops, reference, use_backend

__all__ = ["PROVIDERS", "Coupling"]

PROVIDERS = ("glf_fast", "eager", "compile")


class Coupling:
    """One provider's passes over one case's tensors; `seed` makes other tensors of the same case."""

    def __init__(self, name: str, case: CouplingCase, device: str = "cpu", seed: int = 0) -> None:
        self.function = _function(name)
        self.inputs = case.inputs(device, seed)
        with torch.no_grad(), use_backend("reference"):
            results = reference.affine_coupling(*self.inputs)
            self.gradients = [torch.randn_like(t) for t in results]

    def run(self, mode: str) -> tuple[Tensor, ...]:
        """One pass: w and logdet, or the gradients of v, u and t."""
        if mode == "train":
            return torch.autograd.grad(self.function(*self.inputs), self.inputs, self.gradients)
        with torch.no_grad():
            return self.function(*self.inputs, inverse=mode == "inverse")

    def why_wrong(self, mode: str) -> str:
        """What is wrong with its results, or ""."""
        exact = [t.detach().double().requires_grad_() for t in self.inputs]
        results: tuple[Tensor, ...] = reference.affine_coupling(*exact, inverse=mode == "inverse")
        if mode == "train":
            results = torch.autograd.grad(results, exact, [g.double() for g in self.gradients])
        return why_wrong(self.run(mode), [t.detach() for t in results])


@cache
def _function(name: str) -> Callable[..., Any]:
    """One compilation for all that have the same shape."""
    if name == "glf_fast":
        return ops.affine_coupling
    return compiled(reference.affine_coupling) if name == "compile" else reference.affine_coupling
