"""Whether samples of a density are distributed as rows that it has not seen."""

from __future__ import annotations

import numpy as np
import torch

from glf_fast import seeds
from glf_fast.tabular.density import TableDensity

__all__ = ["band", "distance", "pit"]

SAMPLES = 20_000  # of a density without context
ROWS, SAMPLES_EACH = 500, 200  # of one with a context


def pit(density: TableDensity, values: np.ndarray, context: np.ndarray | None, seed: int) -> np.ndarray:
    """Probability integral transforms (n, D + 1): for each row, the share of samples below it.

    The first column is about log p of rows and samples, the others are about the columns. With a context, samples have the
    row's own. For rows of the density itself each column is uniform on [0, 1].

    Sources: Gneiting et al., Probabilistic forecasts, calibration and sharpness, 2007; for log p, Hermans et al.,
    arXiv:2110.06581 (expected coverage).
    """
    if context is None:
        rows = values[:SAMPLES]
        samples = density.sample(SAMPLES, seed=seed, noisy=True)
        samples, own = (_with_log_prob(density, part, None) for part in (samples, rows))
        below = np.stack([np.searchsorted(np.sort(s), x) for s, x in zip(samples.T, own.T, strict=True)], 1)
        return (below + _uniform(below.shape, seed)) / (SAMPLES + 1)
    rows, given = values[:ROWS], context[:ROWS]
    repeated = np.repeat(given, SAMPLES_EACH, 0)
    samples = _with_log_prob(density, density.sample(len(repeated), repeated, seed=seed, noisy=True), repeated)
    below = (samples.reshape(len(rows), SAMPLES_EACH, -1) < _with_log_prob(density, rows, given)[:, None]).sum(1)
    return (below + _uniform(below.shape, seed)) / (SAMPLES_EACH + 1)


def _uniform(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return torch.rand(shape, dtype=torch.float64, generator=seeds.generator(seed, "ranks")).numpy()


def _with_log_prob(density: TableDensity, values: np.ndarray, context: np.ndarray | None) -> np.ndarray:
    return np.concatenate([density.log_prob(values, context)[:, None], values], 1)


def band(n: int, bins: int, confidence: float = 0.95) -> tuple[float, float]:
    """The least and the most rows of n that fall into any of the bins, for uniform numbers, with this confidence."""
    counts = np.random.default_rng(0).multinomial(n, [1 / bins] * bins, size=4000)
    tail = (1 - confidence) / 2
    return float(np.quantile(counts.min(1), tail)), float(np.quantile(counts.max(1), 1 - tail))


def distance(u: np.ndarray) -> float:
    """Kolmogorov–Smirnov distance of numbers (n,) from a uniform distribution on [0, 1]."""
    u, steps = np.sort(u), np.arange(len(u) + 1) / len(u)
    return float(max((steps[1:] - u).max(), (u - steps[:-1]).max()))
