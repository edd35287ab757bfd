"""Mixtures of normal distributions with full covariances, fitted by expectation maximisation, on any device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from glf_fast.errors import UserError

__all__ = ["MixtureFit", "fit_mixture", "least_variance", "log_densities"]

# Rows whose densities are computed at once: 16,384 × 10 components × 128 dimensions of float64 are 168 MB.
_ROWS = 16_384


class MixtureFit(NamedTuple):
    """A mixture Σ_k w_k·N(μ_k, L_k·L_kᵀ), float64.

    Attributes:
        weights: w (K,).    means: μ (K, D).    factors: L (K, D, D), lower triangular with positive diagonals.
        log_likelihood: mean of log p over the rows, in nats.    iterations: steps of expectation maximisation.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor
    log_likelihood: float
    iterations: int


def fit_mixture(
    x: Tensor,
    components: int,
    *,
    tolerance: float = 1e-3,
    most: int = 2000,
    seed: int = 0,
    start: Tensor | None = None,
) -> MixtureFit:
    """The maximum-likelihood mixture of `components` normal distributions for the rows x (N, D), computed in float64.

    Expectation maximisation (Dempster, Laird, Rubin, 1977) from the clusters of k-means++ and Lloyd's iterations. Steps and
    stopping rule are those of scikit-learn's GaussianMixture: from the same start both give the same numbers, if its reg_covar
    is `least_variance(x)`, which is added to all variances. So columns that are constant or depend on each other are no error.
    Components beyond the number of different rows get weights of almost 0.

    Args:
        tolerance: stop when a step changes the mean log-likelihood by less than this.    most: steps at most.
        seed: of the first clusters' centres.
        start: responsibilities (N, K) to begin with, in place of the clusters.

    Raises:
        UserError: rows that are not finite.
        ValueError: no rows.
    """
    if x.ndim != 2 or not len(x):
        raise ValueError(f"x must be (N, D) with one row or more; got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise UserError(
            "codes are not finite, so no density can be fitted to them: training has diverged; lower the learning rates"
        )
    ridge, x = least_variance(x), x.double()
    weights, means, factors = _maximisation(x, start if start is not None else _clusters(x, components, seed), ridge)
    before = value = -math.inf
    iterations = 0
    while iterations < most:
        iterations += 1
        responsibilities, value = _expectation(x, weights, means, factors)
        weights, means, factors = _maximisation(x, responsibilities, ridge)
        if abs(value - before) < tolerance:
            break
        before = value
    return MixtureFit(weights, means, factors, value, iterations)


def least_variance(x: Tensor) -> float:
    """A millionth of the mean variance of the rows x (N, D), which is added to the variances of distributions fitted to them.

    It is relative, unlike scikit-learn's reg_covar = 1e-6, so that a fit does not depend on the unit of codes, which an
    encoder is free to choose. Where all rows are equal up to rounding, it is a millionth of the squared rounding error.
    """
    rounding = torch.finfo(x.dtype).eps * x.abs().max().item()
    variance = x.double().var(0, correction=0).mean().item()
    return 1e-6 * max(variance, rounding**2, torch.finfo(torch.float32).tiny)


def log_densities(x: Tensor, weights: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    """log w_k + log N(x; μ_k, L_k·L_kᵀ) of the rows x (N, D) for each component: (N, K)."""
    logs = []
    for weight, mean, factor in zip(weights, means, factors, strict=True):
        whitened = torch.linalg.solve_triangular(factor, (x - mean).mT, upper=False)
        volume = factor.diagonal().log().sum() + 0.5 * len(mean) * math.log(2 * math.pi)
        logs.append(weight.log() - volume - 0.5 * whitened.square().sum(0))
    return torch.stack(logs, 1)


def _expectation(x: Tensor, weights: Tensor, means: Tensor, factors: Tensor) -> tuple[Tensor, float]:
    """Responsibilities (N, K) of the components, and the mean log-likelihood."""
    logs = torch.cat([log_densities(rows, weights, means, factors) for rows in x.split(_ROWS)])
    totals = logs.logsumexp(1, keepdim=True)
    return (logs - totals).exp(), totals.mean().item()


def _maximisation(x: Tensor, responsibilities: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and factors of the components with these responsibilities (N, K)."""
    counts = responsibilities.sum(0) + 10 * torch.finfo(x.dtype).eps
    means = responsibilities.mT @ x / counts[:, None]
    covariances = []
    for mean, share, count in zip(means, responsibilities.unbind(1), counts, strict=True):
        centred = x - mean
        covariance = (share[:, None] * centred).mT @ centred / count
        covariance.diagonal().add_(ridge)
        covariances.append(covariance)
    return counts / counts.sum(), means, torch.linalg.cholesky(torch.stack(covariances))


def _clusters(x: Tensor, count: int, seed: int) -> Tensor:
    """The clusters (N, K) of k-means as responsibilities of 0 and 1: k-means++ (Arthur, Vassilvitskii, 2007), then Lloyd's."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(x), (1,), generator=generator))
    centres = [x[first]]
    nearest = (x - centres[0]).square().sum(1)
    for _ in range(count - 1):
        # The sum of squares is inverted on the CPU, so that every device draws the same rows.
        at = torch.rand(1, generator=generator, dtype=torch.float64).to(x.device) * nearest.sum()
        centres.append(x[min(int(torch.searchsorted(nearest.cumsum(0), at)), len(x) - 1)])
        nearest = torch.minimum(nearest, (x - centres[-1]).square().sum(1))
    means = torch.stack(centres)
    chosen = torch.full((len(x),), -1, device=x.device)
    for _ in range(300):
        # ‖x‖² is the same for all centres, so it does not matter which is nearest.
        now = (means.square().sum(1) - 2 * x @ means.mT).argmin(1)
        if torch.equal(now, chosen):
            break
        chosen = now
        members = torch.zeros(len(x), count, dtype=x.dtype, device=x.device).scatter_(1, chosen[:, None], 1.0)
        sizes = members.sum(0)
        means = torch.where(sizes[:, None] > 0, members.mT @ x / sizes.clamp(min=1)[:, None], means)
    return torch.zeros(len(x), count, dtype=x.dtype, device=x.device).scatter_(1, chosen[:, None], 1.0)
