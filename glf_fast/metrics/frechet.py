"""Fréchet distance between two Gaussians fitted to features, and its jackknife interval."""

from __future__ import annotations

import math

import torch

from glf_fast.errors import UserError
from glf_fast.metrics.estimates import GROUPS, jackknife
from glf_fast.metrics.linalg import eigvalsh, svdvals
from glf_fast.metrics.stats import FeatureStats

__all__ = ["frechet_distance", "jackknife_interval"]


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """‖μ₁−μ₂‖² + tr Σ₁ + tr Σ₂ − 2·tr √(Σ₁Σ₂): squared Wasserstein-2 distance of the two Gaussians, ≥ 0.

    Dowson & Landau (1982), equation 4; on Inception features it is FID (Heusel et al., arXiv:1706.08500, equation 6).

    With any F₁ᵀF₁ = Σ₁ and F₂ᵀF₂ = Σ₂ the last trace is the nuclear norm of F₂F₁ᵀ, which equals Σ √eig(F₂Σ₁F₂ᵀ). Both are
    symmetric problems without the square root of a matrix. F₂ is the root of `b`, which is computed once, so `b` should be the
    reference. If there are no more features than dimensions and all are kept, F holds the centred features themselves, which
    is exact; the eigenvalues of a singular covariance would cost digits. O(dim³).

    Raises:
        UserError: fewer than two features, different extractors or dimensions, moments so large that float64 overflows.
    """
    a.check_comparable(b)
    device = a.mean.device
    factor = b.factor().to(device)
    if a.n <= a.dim and a.complete:
        cross = svdvals(factor @ a.factor().T).sum()
    else:
        cross = eigvalsh(factor @ a.cov @ factor.T).clamp(min=0).sqrt().sum()
    traces = a.cov.trace() + b.cov.trace().to(device)
    distance = float((a.mean - b.mean.to(device)).square().sum() + traces - 2 * cross)
    if not math.isfinite(distance):  # checked before the clamp, since max(0, NaN) is 0, a perfect score
        raise UserError(
            f"the Fréchet distance is {distance}, because the moments of the features overflow; check the features for "
            "huge values"
        )
    return max(0.0, distance)


def jackknife_interval(samples: FeatureStats, reference: FeatureStats) -> tuple[float, float]:
    """95 % interval for the distance of `samples` from `reference`, over draws of the samples with a fixed reference.

    Delete-a-group jackknife (`estimates.jackknife`). The groups are subtracted from the merged moments, so the cost is one
    covariance of all samples and 20 distances. The interval shows how much the distance of another draw of equally many
    samples would vary. It does not show the bias of few samples; the distances between real images (`Reference.floors`) show
    it.

    Raises:
        ValueError: fewer than 40 samples, or statistics that have not kept all features.
    """
    if samples.n < 2 * GROUPS or not samples.complete:
        raise ValueError(f"the jackknife needs at least {2 * GROUPS} samples with all features kept; got {samples!r}")
    device, features = samples.mean.device, samples.kept
    distances = []
    for group in range(GROUPS):
        part = FeatureStats(samples.dim, extractor=samples.extractor, device=device)
        part.update(features[group::GROUPS])
        rest = samples.without(part)
        if rest.n <= rest.dim:  # the exact path needs the features themselves
            others = torch.arange(len(features), device=device) % GROUPS != group
            rest = FeatureStats(samples.dim, keep=rest.n, extractor=samples.extractor, device=device)
            rest.update(features[others])
        distances.append(frechet_distance(rest, reference))
    interval = jackknife(
        frechet_distance(samples, reference), torch.tensor(distances, dtype=torch.float64), low=0
    ).interval
    assert interval is not None
    return interval
