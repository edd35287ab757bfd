"""Density and coverage: precision and recall that one outlier cannot blow up."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from glf_fast.metrics import neighbours
from glf_fast.metrics.estimates import GROUPS, Estimate, jackknife
from glf_fast.metrics.neighbours import radii, squared_distances
from glf_fast.metrics.stats import FeatureStats

__all__ = ["NEIGHBOURS", "DensityCoverage", "density_coverage"]

NEIGHBOURS = 5


class DensityCoverage(NamedTuple):
    """Density, 0 or more, and coverage, in [0, 1], of `n` features of either set with balls of `k` neighbours."""

    density: Estimate
    coverage: Estimate
    n: int
    k: int


def density_coverage(samples: FeatureStats, reference: FeatureStats, k: int = NEIGHBOURS) -> DensityCoverage:
    """Density and coverage (Naeem et al., arXiv:2002.09797, equations 3 and 4) of the kept features.

    Each real feature is the centre of a ball that reaches to its k-th nearest real neighbour. Density is the number of balls
    around a sample, divided by k, on average over the samples; it may be above 1. Coverage is the fraction of balls that hold a
    sample. A feature on the surface of a ball is in it, as in `precision_recall`. Equally many features of either set are used,
    the first ones. For two sets of one distribution density is 1 on average, and coverage is 1 − (n−1)…(n−k)/((2n−1)…(2n−k)),
    about 1 − 2⁻ᵏ. Costs O(n²·dim), in float64.

    Raises:
        TooFew: k or fewer features kept on either side.
        UserError: different extractors.
    """
    fake, real = neighbours.equally_many("density and coverage", samples, reference, k)
    n = len(real)
    of_real = radii(real, k)
    groups = torch.arange(n, device=fake.device) % GROUPS
    balls = torch.zeros(GROUPS, dtype=torch.float64, device=fake.device)  # around the samples of each group
    covered = torch.zeros(GROUPS, n, dtype=torch.float64, device=fake.device)  # balls by samples of each group
    for points, group in zip(fake.split(neighbours.CHUNK), groups.split(neighbours.CHUNK), strict=True):
        within = (squared_distances(points, real, rounding=neighbours.ROUNDING) <= of_real).double()
        balls.index_add_(0, group, within.sum(1))
        covered.index_add_(0, group, within)
    density, coverage = float(balls.sum()) / (k * n), float((covered.sum(0) > 0).double().mean())
    if n < 2 * GROUPS:
        return DensityCoverage(Estimate(density, None), Estimate(coverage, None), n, k)
    counts = torch.bincount(groups, minlength=GROUPS)
    densities = (balls.sum() - balls) / (k * (n - counts))
    coverages = (covered.sum(0) - covered > 0).double().mean(1)
    return DensityCoverage(jackknife(density, densities, 0, math.inf), jackknife(coverage, coverages, 0, 1), n, k)
