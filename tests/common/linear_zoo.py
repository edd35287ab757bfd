"""Matrices that linear algebra must survive, and the scaled residuals that LAPACK's own tests use."""

import math

import torch
from torch import Tensor

LIMIT = 30.0  # LAPACK's threshold for scaled residuals


def zoo(dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name → (D, D)."""
    g = torch.Generator().manual_seed(dim)
    random = torch.randn(dim, dim, generator=g, dtype=torch.float64)
    orthogonal = torch.linalg.qr(random).Q
    other = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q
    i = torch.arange(dim, dtype=torch.float64)
    sine, cosine = math.sin(1.2), math.cos(1.2)
    growth = torch.eye(dim) - torch.ones(dim, dim).tril(-1)
    growth[:, -1] = 1
    conditioned = {
        f"condition 1e{n}": orthogonal @ torch.diag(10 ** (-n * i / max(dim - 1, 1))) @ other for n in (2, 5)
    }
    named = {
        "random": random,
        "orthogonal": orthogonal,
        "identity": torch.eye(dim, dtype=torch.float64),
        "reversed": torch.eye(dim, dtype=torch.float64).flip(0),
        "upper": random.triu() + 2 * torch.eye(dim),
        "lower": random.tril() + 2 * torch.eye(dim),
        "hilbert": 1 / (i[:, None] + i + 1),
        "kahan": torch.diag(sine**i) @ (torch.eye(dim, dtype=torch.float64) - cosine * torch.ones(dim, dim).triu(1)),
        "graded rows": random * (10 ** (-6 * i / dim))[:, None],
        "graded columns": random * 10 ** (-6 * i / dim),
        "growth": growth,
        "large": random * 1e15,
        "small": random * 1e-15,
        **conditioned,
    }
    return {name: matrix.to(dtype).contiguous() for name, matrix in named.items()}


def inverse_residual(A: Tensor, inverse: Tensor) -> float:
    """‖X A − I‖ or ‖A X − I‖, whichever is smaller, over D ‖A‖ ‖X‖ ε: the largest of a batch."""
    a, x, eye = A.double(), inverse.double(), torch.eye(A.shape[-1], dtype=torch.float64)
    norm = lambda m: torch.linalg.norm(m, dim=(-2, -1))  # noqa: E731
    error = torch.minimum(norm(a @ x - eye), norm(x @ a - eye))
    return float((error / (A.shape[-1] * torch.finfo(A.dtype).eps * norm(a) * norm(x))).max())
