"""Eigenvalues and singular values, computed on the CPU where the solver of a GPU fails."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["eigh", "eigvalsh", "svdvals"]


def _solve_with_fallback(solve: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor) -> tuple[Tensor, ...]:
    """`solve(matrix)` on the matrix's device, or on the CPU if the solver of the device fails or returns NaN."""
    try:
        solution = solve(matrix)
    except RuntimeError:
        if matrix.device.type == "cpu":
            raise
    else:
        if matrix.device.type == "cpu" or all(bool(torch.isfinite(part).all()) for part in solution):
            return solution
    return tuple(part.to(matrix.device) for part in solve(matrix.cpu()))


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,) in ascending order and eigenvectors (d, d) of a symmetric matrix."""
    w, v = _solve_with_fallback(lambda m: tuple(torch.linalg.eigh(m)), matrix)
    return w, v


def eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues (d,) of a symmetric matrix in ascending order."""
    return _solve_with_fallback(lambda m: (torch.linalg.eigvalsh(m),), matrix)[0]


def svdvals(matrix: Tensor) -> Tensor:
    """Singular values of any matrix, in descending order."""
    return _solve_with_fallback(lambda m: (torch.linalg.svdvals(m),), matrix)[0]
