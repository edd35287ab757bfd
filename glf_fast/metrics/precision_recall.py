"""Improved precision and recall: how many samples look real, and how many real images the samples cover."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glf_fast.metrics.stats import FeatureStats

__all__ = ["NEIGHBOURS", "PrecisionRecall", "precision_recall"]

NEIGHBOURS = 3
# Distances are computed for this many rows at a time: 80 MB for 10,000 features.
_CHUNK = 1000
# A squared distance has rounding errors of about 1e-15 of the squared norms. Distances that differ by less are taken for equal.
_ROUNDING = 1e-12


class PrecisionRecall(NamedTuple):
    """Precision and recall, in [0, 1], of `n` features of either set with the distances to `k` neighbours."""

    precision: float
    recall: float
    n: int
    k: int


def precision_recall(samples: FeatureStats, reference: FeatureStats, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., arXiv:1904.06991, equations 1 and 2) of the kept features.

    The manifold of a set is the union of balls: each feature is the centre of a ball that reaches to its k-th nearest neighbour
    in the same set. Precision is the fraction of samples on the manifold of the reference, recall the fraction of the reference
    on the manifold of the samples. A feature on the surface of a ball is in it. Both values depend on the number of features.
    Therefore the same number is taken from either set, the first ones. Costs O(n²·dim), in float64.

    Raises:
        ValueError: k or fewer features kept on either side, different extractors.
    """
    samples.check_comparable(reference)
    n = min(len(samples.kept), len(reference.kept))
    if k < 1 or n <= k:
        raise ValueError(
            f"precision and recall need k ≥ 1 and more than k kept features on each side, got {n} and k={k}"
        )
    fake = samples.kept[:n].double()
    real = reference.kept[:n].to(fake.device).double()
    centre = real.mean(0)  # rounding errors grow with the norms
    fake, real = fake - centre, real - centre
    of_fake, of_real = _radii(fake, k), _radii(real, k)
    precise, recalled = 0, torch.zeros(n, dtype=torch.bool, device=fake.device)
    for points, radii in zip(fake.split(_CHUNK), of_fake.split(_CHUNK), strict=True):
        squared = _squared_distances(points, real, rounding=_ROUNDING)
        precise += int((squared <= of_real).any(1).sum())
        recalled |= (squared <= radii[:, None]).any(0)
    return PrecisionRecall(precise / n, int(recalled.sum()) / n, n, k)


def _radii(centres: Tensor, k: int) -> Tensor:
    """The squared distance (n,) of each centre (n, d) to its k-th nearest neighbour among the other centres."""
    radii = []
    for start in range(0, len(centres), _CHUNK):
        squared = _squared_distances(centres[start : start + _CHUNK], centres)
        rows = torch.arange(len(squared), device=squared.device)
        squared[rows, start + rows] = torch.inf  # no centre is its own neighbour
        radii.append(squared.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor, rounding: float = 0.0) -> Tensor:
    """‖aᵢ − bⱼ‖² − rounding·(‖aᵢ‖² + ‖bⱼ‖²), (n, m); values may be below zero."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(norms, a, b.T, beta=1 - rounding, alpha=-2)
