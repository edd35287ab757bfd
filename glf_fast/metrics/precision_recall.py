"""Improved precision and recall: how many samples look real, and how many real images the samples cover."""

from __future__ import annotations

from typing import NamedTuple

import torch

from glf_fast.metrics import neighbours
from glf_fast.metrics.neighbours import radii, squared_distances
from glf_fast.metrics.stats import FeatureStats

__all__ = ["NEIGHBOURS", "PrecisionRecall", "precision_recall"]

NEIGHBOURS = 3


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
        TooFew: k or fewer features kept on either side.
        UserError: different extractors.
    """
    fake, real = neighbours.equally_many("precision and recall", samples, reference, k)
    n = len(real)
    of_fake, of_real = radii(fake, k), radii(real, k)
    precise, recalled = 0, torch.zeros(n, dtype=torch.bool, device=fake.device)
    for points, reach in zip(fake.split(neighbours.CHUNK), of_fake.split(neighbours.CHUNK), strict=True):
        squared = squared_distances(points, real, rounding=neighbours.ROUNDING)
        precise += int((squared <= of_real).any(1).sum())
        recalled |= (squared <= reach[:, None]).any(0)
    return PrecisionRecall(precise / n, int(recalled.sum()) / n, n, k)
