"""Bayesian optimisation in a latent space: a Gaussian process of the objective, and batches by expected improvement."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from glf_fast.errors import UserError

__all__ = ["check_search", "search"]

# Points among which a batch is chosen.
CANDIDATES = 1000
# Noise of an observation, relative to the deviation of all values: points that are decoded to the same text are no error.
_NOISE = 1e-3

Array = np.ndarray


def check_search() -> None:
    """Raise UserError unless scikit-learn is installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError("the Gaussian process of a search is scikit-learn's: pip install scikit-learn") from error


def search(
    codes: Array,
    values: Array,
    judge: Callable[[Array], Array],
    draw: Callable[[int, int], Array],
    *,
    rounds: int = 5,
    batch: int = 50,
    seed: int = 0,
) -> None:
    """Minimise an objective of codes, beginning with known codes (N, D) and their values (N,).

    In each round a Gaussian process with a Matérn kernel (ν = 5/2) is fitted to all known points. A batch is chosen greedily by
    expected improvement among 1,000 candidates, half of them drawn from the model, half near the best codes. After each choice
    the process takes its own mean for the value of the chosen point (kriging believer), so that the next choice is made
    elsewhere. A round of N points costs O(N³): some hundred known codes are a good start.

    Args:
        judge: the values (B,) of codes (B, D), called once a round; it may keep what it has seen.
        draw: draw(round, n) gives n codes of the model.
        seed: of the random choices.
    """
    check_search()
    random = np.random.default_rng(seed)
    # An encoder that does not use a dimension gives it the same number everywhere, and the model draws it from N(0, 1).
    scale = np.maximum(codes.std(0), draw(0, CANDIDATES).std(0)) + 1e-12
    x, y = codes / scale, values.astype(np.float64)
    for number in range(rounds):
        near = x[np.argsort(y)[:10]][random.integers(0, min(10, len(y)), CANDIDATES // 2)]
        steps = random.choice([0.1, 0.3, 1.0], (len(near), 1)) * random.standard_normal(near.shape)
        candidates = np.concatenate([draw(number, CANDIDATES - len(near)) / scale, near + steps])
        mean, covariance = _posterior(x, y, candidates)
        picked = candidates[_batch(mean, covariance, y.min(), batch)]
        found = judge(picked * scale)
        x, y = np.concatenate([x, picked]), np.concatenate([y, found])


def _posterior(x: Array, y: Array, candidates: Array) -> tuple[Array, Array]:
    """Mean (N,) and covariance (N, N) of the objective itself at candidates, without the noise of an observation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    noise = WhiteKernel(0.1, (_NOISE, 1e1))
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(np.sqrt(x.shape[1]), (1e-1, 1e3), nu=2.5) + noise
    process: Any = GaussianProcessRegressor(kernel, random_state=0)
    center, scale = y.mean(), y.std() or 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a bound of a kernel's parameter is no fault
        process.fit(x, (y - center) / scale)
    mean, covariance = process.predict(candidates, return_cov=True)
    # scikit-learn's covariance is that of new observations. Conditioned are the known values with their noise; what is
    # asked, and what the believer believes, is the objective without it.
    diagonal = np.einsum("ii->i", covariance)
    diagonal[:] = np.maximum(diagonal - process.kernel_.k2.noise_level, 0)
    return center + scale * mean, scale**2 * covariance


def _improvement(mean: Array, variance: Array, least: float) -> Array:
    """Expected improvement below `least` of normally distributed values."""
    from scipy.stats import norm

    deviation = np.sqrt(np.maximum(variance, 1e-12))
    gain = (least - mean) / deviation
    improvement: Array = deviation * (gain * norm.cdf(gain) + norm.pdf(gain))
    return improvement


def _batch(mean: Array, covariance: Array, least: float, count: int) -> list[int]:
    """Indices of a batch, chosen greedily by expected improvement below `least`."""
    chosen: list[int] = []
    covariance = covariance.copy()
    for _ in range(count):
        improvement = _improvement(mean, covariance.diagonal(), least)
        improvement[chosen] = -np.inf
        best = int(improvement.argmax())
        chosen.append(best)
        least = min(least, float(mean[best]))
        column = covariance[:, best].copy()
        covariance -= np.outer(column, column) / max(column[best], 1e-12)
    return chosen
