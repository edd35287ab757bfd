"""Precision and recall of distributions: a curve, and the two numbers F8 (recall) and F1/8 (precision) that sum it up."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glf_fast.metrics.estimates import GROUPS, Estimate, TooFew, group_counts, jackknife
from glf_fast.metrics.neighbours import squared_distances
from glf_fast.metrics.stats import FeatureStats
from glf_fast.seeds import generator

__all__ = ["CLUSTERS", "PRD", "RUNS", "prd", "prd_curve"]

CLUSTERS, RUNS, ANGLES = 20, 10, 1001
BETA = 8
# Centres are fitted to this many features, and all features are then assigned to them.
_FITTED, _ITERATIONS = 5000, 30


class PRD(NamedTuple):
    """The curve, precision and recall (1001,) at growing slopes, and F8 and F1/8, all in [0, 1]."""

    f8: Estimate
    f1_8: Estimate
    precision: Tensor
    recall: Tensor
    n: int


def prd(samples: FeatureStats, reference: FeatureStats, *, seed: int = 0) -> PRD:
    """PRD of the kept features (Sajjadi et al., arXiv:1806.00035, sections 3.3 and 4.1).

    The union of both sets is divided into 20 clusters by k-means. Q and P are the fractions of samples and of real images in
    each cluster; the curve is the mean of ten clusterings. F8 weights recall: it is low if samples miss what real images have.
    F1/8 weights precision: it is low if samples are what no real image is. **The samples come first**: exchanged arguments
    exchange the two. Equally many features of either set are used, the first ones.

    The interval is for other draws of the samples; clusters are not fitted again.

    Raises:
        TooFew: fewer than 20 features kept on either side.
        UserError: different extractors.
    """
    samples.check_comparable(reference)
    n = min(len(samples.kept), len(reference.kept))
    if n < CLUSTERS:
        raise TooFew(f"PRD needs at least {CLUSTERS} kept features on each side, got {n}")
    features = torch.cat([samples.kept[:n], reference.kept[:n].to(samples.kept.device)])
    features = features - features.mean(0)
    sampled, real = [], []
    for run in range(RUNS):
        labels = _clusters(features, generator(seed, "prd", run))
        groups = group_counts(labels[:n], CLUSTERS)
        sampled.append(torch.cat([groups.sum(0, keepdim=True), groups.sum(0) - groups]))  # all, then without each group
        real.append(torch.bincount(labels[n:], minlength=CLUSTERS).double())
    q, p = torch.stack(sampled), torch.stack(real)[:, None]
    precision, recall = prd_curve(q, p.expand_as(q))
    precision, recall = precision.mean(0), recall.mean(0)  # over the clusterings

    def estimate(beta: float) -> Estimate:
        f = _highest_f(precision, recall, beta)
        return jackknife(float(f[0]), f[1:], 0, 1) if n >= 2 * GROUPS else Estimate(float(f[0]), None)

    return PRD(estimate(BETA), estimate(1 / BETA), precision[0].cpu(), recall[0].cpu(), n)


def prd_curve(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """α(λ) = Σ min(λ·P, Q) and β(λ) = α(λ)/λ of histograms (…, K), each (…, 1001), at λ = tan θ (equations 2 to 4, 7).

    α is the precision of the samples' histogram Q, β the recall of the real images' histogram P.
    """
    q = samples / samples.sum(-1, keepdim=True)
    p = reference / reference.sum(-1, keepdim=True)
    angles = torch.linspace(1e-10, math.pi / 2 - 1e-10, ANGLES, dtype=torch.float64, device=q.device)
    slopes = angles.tan()
    precision = torch.zeros(*q.shape[:-1], ANGLES, dtype=torch.float64, device=q.device)
    for k in range(q.shape[-1]):  # one cluster at a time: all at once would take 20 times the memory
        precision += torch.minimum(p[..., k, None] * slopes, q[..., k, None])
    return precision.clamp(0, 1), (precision / slopes).clamp(0, 1)


def _highest_f(precision: Tensor, recall: Tensor, beta: float) -> Tensor:
    """The highest F_β = (1 + β²)·α·β/(β²·α + β) on curves (…, 1001)."""
    products = precision * recall
    f = (1 + beta**2) * products / (beta**2 * precision + recall)
    return torch.where(products > 0, f, 0).amax(-1)


def _clusters(features: Tensor, random: torch.Generator) -> Tensor:
    """The cluster (N,) of each feature, by k-means: k-means++ and Lloyd's iterations on a random part of the features."""
    part = features[torch.randperm(len(features), generator=random)[:_FITTED].to(features.device)]
    nearest = part.new_full((len(part),), torch.inf, dtype=torch.float64)
    chosen = [int(torch.randint(len(part), (), generator=random))]
    for _ in range(CLUSTERS - 1):
        nearest = torch.minimum(nearest, (part - part[chosen[-1]]).double().square().sum(1))
        cumulated = nearest.cumsum(0)
        drawn = cumulated[-1] * torch.rand((), generator=random, dtype=torch.float64).to(part.device)
        chosen.append(min(int(torch.searchsorted(cumulated, drawn, right=True)), len(part) - 1))
    centres, labels = part[chosen], None
    for _ in range(_ITERATIONS):
        now = squared_distances(part, centres).argmin(1)
        if labels is not None and torch.equal(now, labels):
            break
        labels = now
        members = F.one_hot(labels, CLUSTERS).to(part.dtype)
        counts, sums = members.sum(0)[:, None], members.T @ part
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)  # an empty cluster keeps its centre
    return squared_distances(features, centres).argmin(1)
