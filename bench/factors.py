"""Matrices from triangular factors: the PLU layers of every default flow assembled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.check import why_wrong
from glf_fast import ops, reference

__all__ = ["ASSEMBLED", "Assembled", "PluCase"]


@dataclass(frozen=True)
class PluCase:
    """K layers P L (U + diag(d)) of D × D with the ActNorm before each, as near to the identity as those of a trained flow."""

    count: int
    dim: int

    @property
    def name(self) -> str:
        """plu-K-D."""
        return f"plu-{self.count}-{self.dim}"

    def inputs(self, device: str = "cpu") -> list[Tensor]:
        """permutation, sign, then what is trained: lower, upper (K, D, D), log_diag, log_scale, bias (K, D)."""
        torch.manual_seed(0)
        K, D = self.count, self.dim
        permutation = torch.stack([torch.randperm(D) for _ in range(K)]).to(device)
        sign = torch.randn(K, D, device=device).sign()
        matrices = [0.3 * torch.randn(K, D, D, device=device) / D**0.5 for _ in range(2)]
        vectors = [0.1 * torch.randn(K, D, device=device) for _ in range(3)]
        return [permutation, sign, *(t.requires_grad_() for t in (*matrices, *vectors))]

    def operations(self, mode: str) -> int:
        """L U 2/3 D³ and the inverse 4/3 D³ each; train: L U, and two products with triangles backward."""
        return 2 * self.count * self.dim**3

    def bytes(self, mode: str) -> int:
        """In float32: factors read, A and A⁻¹ written; train: factors read twice, A written, ∂A read, gradients written."""
        return 4 * self.count * self.dim**2 * (4 if mode == "forward" else 8)


class Assembled:
    """One provider's passes; forward as sampling needs them, with inverses; train as density does, without."""

    def __init__(self, name: str, case: PluCase, device: str = "cpu") -> None:
        self.function = ops.plu_assemble if name == "glf_fast" else reference.plu_assemble
        self.inputs = case.inputs(device)
        K, D = case.count, case.dim
        torch.manual_seed(1)
        self.gradients = [torch.randn(size, device=device) for size in ((K, D, D), (K, D), (K,))]

    def run(self, mode: str) -> list[Tensor]:
        """[A, A⁻¹, c, log|det A|], or the gradients of lower, upper, log_diag, log_scale and bias."""
        return assemble(self.function, mode, self.inputs, self.gradients)

    def why_wrong(self, mode: str) -> str:
        """What is wrong with its results, or ""."""
        permutation, *floats = (t.detach() for t in self.inputs)
        sign, *trained = (t.double() for t in floats)
        inputs = [permutation, sign, *(t.requires_grad_() for t in trained)]
        exact = assemble(reference.plu_assemble, mode, inputs, [g.double() for g in self.gradients])
        return why_wrong(self.run(mode), exact)


def assemble(function: Callable[..., Any], mode: str, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """One pass."""
    permutation, sign, lower, upper, log_diag, *actnorm = inputs
    plu = permutation, lower, upper, log_diag, sign, *actnorm
    if mode == "train":
        A, _, c, logabsdet = function(*plu, need_inverse=False)
        return list(torch.autograd.grad([A, c, logabsdet], inputs[2:], gradients))
    with torch.no_grad():
        return list(function(*plu))


# glf-cifar's layers, glf-mnist's, wide's, sbi's.
ASSEMBLED = [PluCase(8, 64), PluCase(8, 20), PluCase(16, 128), PluCase(5, 8)]
