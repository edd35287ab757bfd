"""Distances between features, and balls that reach to the k-th nearest neighbour."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CHUNK", "ROUNDING", "radii", "squared_distances"]

# Distances are computed for this many rows at a time: 80 MB for 10,000 features.
CHUNK = 1000
# A squared distance has rounding errors of about 1e-15 of the squared norms. Distances that differ by less are taken for equal.
ROUNDING = 1e-12


def radii(centres: Tensor, k: int) -> Tensor:
    """The squared distance (n,) of each centre (n, d) to its k-th nearest neighbour among the other centres."""
    found = []
    for start in range(0, len(centres), CHUNK):
        squared = squared_distances(centres[start : start + CHUNK], centres)
        rows = torch.arange(len(squared), device=squared.device)
        squared[rows, start + rows] = torch.inf  # no centre is its own neighbour
        found.append(squared.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(found)


def squared_distances(a: Tensor, b: Tensor, rounding: float = 0.0) -> Tensor:
    """‖aᵢ − bⱼ‖² − rounding·(‖aᵢ‖² + ‖bⱼ‖²), (n, m); values may be below zero."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(norms, a, b.T, beta=1 - rounding, alpha=-2)
