"""Two moons with sbi's NPE: the task, its exact posterior, training and quality of sbi's default estimator and of ours.

Time is that of `NPE.train()` with sbi's default settings, until its own stopping rule: one run a seed, both estimators in turn.
Quality is C2ST by sbi's own function, which is not timed.

The task is that of "Benchmarking simulation-based inference" (arXiv:2101.04653), appendix T.8, whose posterior can be sampled
exactly.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import Unrated
from bench.race import Clock, Job, Provider

__all__ = ["OBSERVATIONS", "PROVIDERS", "MoonsCase", "c2st", "exact_posterior", "simulate", "train"]

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


@dataclass(frozen=True)
class MoonsCase(Unrated):
    """One run a seed."""

    simulations: int = 10_000
    seeds: int = 5
    samples: int = 2_000
    name: str = "two-moons"

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": 200, "simulations": self.simulations}


@cache
def runs(case: MoonsCase) -> dict[str, list[dict[str, Any]]]:
    """Times and scores of each estimator's runs."""
    from glf_fast.integrations.sbi import coupling_flow

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PROVIDERS}
    with _elsewhere():
        for seed in range(case.seeds):
            for name in [*found] if seed % 2 == 0 else reversed(found):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    posterior, run = train("maf" if name == "sbi" else coupling_flow(), seed, case.simulations)
                    found[name].append(run | {"c2st": c2st(posterior, case.samples)})
                print(f"\nseed {seed}, {name}: {found[name][-1]}", flush=True)
    return found


@contextmanager
def _elsewhere() -> Iterator[None]:
    """In a temporary folder: sbi writes its logs where it is."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _job(name: str, case: MoonsCase, mode: str, clock: Clock) -> Job:
    found = runs(case)[name]
    info = {key: [run[key] for run in found] for key in ("c2st", "epochs", "loss")}
    seconds = [run["seconds"] for run in found]
    return Job(None, lambda _: "", seconds=seconds, info=info | {"parameters": found[0]["parameters"]})


def _why_not(case: MoonsCase, mode: str, device: str) -> str:
    return "" if importlib.util.find_spec("sbi") else "sbi is not installed (make bench installs it)"


PROVIDERS = {name: Provider(name, partial(_job, name), _why_not) for name in ("sbi", "glf_fast")}
