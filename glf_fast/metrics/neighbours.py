"""Distances between features, and balls that reach to the k-th nearest neighbour."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.metrics.estimates import TooFew
from glf_fast.metrics.stats import FeatureStats

__all__ = ["CHUNK", "ROUNDING", "equally_many", "radii", "squared_distances"]

# Distances are computed for this many rows at a time: 80 MB for 10,000 features.
CHUNK = 1000
# A squared distance has rounding errors of about 1e-15 of the squared norms. Distances that differ by less are taken for equal.
ROUNDING = 1e-12


def equally_many(score: str, samples: FeatureStats, reference: FeatureStats, k: int) -> tuple[Tensor, Tensor]:
    """The first n kept features (n, d) of samples and of reference, in float64, less the mean of the reference.

    Raises:
        TooFew: k or fewer features kept on either side.
        UserError: different extractors.
    """
    samples.check_comparable(reference)
    n = min(len(samples.kept), len(reference.kept))
    if k < 1 or n <= k:
        raise TooFew(f"{score} need k ≥ 1 and more than k kept features on each side, got {n} and k={k}")
    fake = samples.kept[:n].double()
    real = reference.kept[:n].to(fake.device).double()
    centre = real.mean(0)  # rounding errors grow with the norms
    return fake - centre, real - centre


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
