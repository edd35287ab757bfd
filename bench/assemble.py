"""The PLU layers of every default flow assembled: their triangular factors as matrices, and inverses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.check import why_wrong
from bench.race import Clock, Job, Provider
from glf_fast import ops, reference

__all__ = ["CASES", "PROVIDERS", "PluCase"]


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

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": self.count, "dim": self.dim}

    def operations(self, mode: str) -> int:
        """L U 2/3 D³ and the inverse 4/3 D³ each; train: L U, and two products with triangles backward."""
        return 2 * self.count * self.dim**3

    def bytes(self, mode: str) -> int:
        """In float32: factors read, A and A⁻¹ written; train: factors read twice, A written, ∂A read, gradients written."""
        return 4 * self.count * self.dim**2 * (4 if mode == "forward" else 8)


def _job(function: Callable[..., Any], case: PluCase, mode: str, clock: Clock) -> Job:
    """Forward as sampling needs them, with inverses; train as density does, without."""
    inputs = case.inputs(clock.DEVICE)
    K, D = case.count, case.dim
    torch.manual_seed(1)
    gradients = [torch.randn(size, device=clock.DEVICE) for size in ((K, D, D), (K, D), (K,))]

    def check(found: list[Tensor]) -> str:
        permutation, *floats = (t.detach() for t in inputs)
        sign, *trained = (t.double() for t in floats)
        exact = [permutation, sign, *(t.requires_grad_() for t in trained)]
        return why_wrong(found, _assemble(reference.plu_assemble, mode, exact, [g.double() for g in gradients]))

    again = partial(_job, function, case, mode, clock)
    return Job(lambda: _assemble(function, mode, inputs, gradients), check, alone=True, again=again)


def _assemble(function: Callable[..., Any], mode: str, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """[A, A⁻¹, c, log|det A|], or the gradients of lower, upper, log_diag, log_scale and bias."""
    permutation, sign, lower, upper, log_diag, *actnorm = inputs
    plu = permutation, lower, upper, log_diag, sign, *actnorm
    if mode == "train":
        A, _, c, logabsdet = function(*plu, need_inverse=False)
        return list(torch.autograd.grad([A, c, logabsdet], inputs[2:], gradients))
    with torch.no_grad():
        return list(function(*plu))


PROVIDERS = {
    "glf_fast": Provider("glf_fast", partial(_job, ops.plu_assemble)),
    "eager": Provider("eager", partial(_job, reference.plu_assemble)),
}
# glf-cifar's layers, glf-mnist's, wide's, sbi's.
CASES = [PluCase(8, 64), PluCase(8, 20), PluCase(16, 128), PluCase(5, 8)]
