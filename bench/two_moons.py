"""Two moons with sbi's NPE: the task, its exact posterior, training and quality of an estimator.

The task is that of "Benchmarking simulation-based inference" (arXiv:2101.04653), appendix T.8, whose posterior can be sampled
exactly.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor

__all__ = ["OBSERVATIONS", "c2st", "exact_posterior", "simulate", "train"]

# Over the range of what the simulator makes.
OBSERVATIONS = torch.tensor([[0.0, 0.0], [-0.4, 0.3], [-0.8, -0.2], [-0.2, -0.6], [-0.6, 0.6]])


def _crescent(n: int) -> Tensor:
    angle, radius = math.pi * (torch.rand(n) - 0.5), 0.1 + 0.01 * torch.randn(n)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)


def simulate(theta: Tensor) -> Tensor:
    """x (N, 2) of θ (N, 2): a crescent, moved by (−|θ₁ + θ₂|, θ₂ − θ₁)/√2."""
    total, difference = theta.sum(1), theta[:, 1] - theta[:, 0]
    return _crescent(len(theta)) + torch.stack([-total.abs(), difference], 1) / math.sqrt(2)


def exact_posterior(x: Tensor, n: int) -> Tensor:
    """n exact samples (n, 2) of p(θ | x) under a uniform prior on [−1, 1]²: the crescent is drawn, the move solved for θ."""
    found: list[Tensor] = []
    while sum(map(len, found)) < n:
        moved = math.sqrt(2) * (x - _crescent(4 * n))
        total = moved[:, 0] * (2 * torch.randint(2, (len(moved),)) - 1)
        theta = torch.stack([total - moved[:, 1], total + moved[:, 1]], 1) / 2
        found.append(theta[(moved[:, 0] <= 0) & (theta.abs() <= 1).all(1)])
    return torch.cat(found)[:n]


def train(density_estimator: Any, seed: int, simulations: int, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A posterior from that many simulations, and what it took."""
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    torch.manual_seed(seed)
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((simulations,))
    trainer = NPE(prior, density_estimator=density_estimator, show_progress_bars=False)
    trainer.append_simulations(theta, simulate(theta))
    start = time.perf_counter()
    trained = trainer.train(**settings)
    seconds = time.perf_counter() - start
    summary = trainer.summary
    return trainer.build_posterior(trained), {
        "seconds": seconds,
        "epochs": summary["epochs_trained"][-1],
        "loss": summary["best_validation_loss"][-1],
        "parameters": sum(p.numel() for p in trained.parameters()),
    }


def c2st(posterior: Any, n: int) -> float:
    """Accuracy of a classifier that tells n posterior samples from n exact ones (0.5 is perfect), mean of the observations."""
    from sbi.utils import metrics

    scores = []
    for x in OBSERVATIONS:
        samples = posterior.sample((n,), x=x[None], show_progress_bars=False)
        scores.append(float(metrics.c2st(exact_posterior(x, n), samples)))
    return statistics.mean(scores)
