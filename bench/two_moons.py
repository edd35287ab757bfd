"""Two moons with sbi's NPE: its default estimator and ours, the same simulations, posterior quality and wall time.

    python -m bench.two_moons [--out FILE] [--seeds 5]        # some minutes, alone on the machine

Quality is C2ST, the accuracy of a classifier that tells posterior samples from exact ones (0.5 is perfect), by sbi's own
function, averaged over observations. Time is that of `NPE.train()`, with sbi's default settings, until its own stopping rule.
The task is two moons of arXiv:2101.04653, appendix T.8, whose posterior can be sampled exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import machine

__all__ = ["ESTIMATORS", "OBSERVATIONS", "exact_posterior", "main", "simulate", "train"]

# Seven observations over the range of what the simulator makes.
OBSERVATIONS = torch.tensor([[0.0, 0.0], [-0.4, 0.3], [-0.8, -0.2], [-0.2, -0.6], [-0.6, 0.6]])
ESTIMATORS = ("sbi", "glf_fast")


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


def estimator(name: str) -> Any:
    """What NPE takes as `density_estimator`: sbi's default, or ours."""
    from glf_fast.integrations.sbi import coupling_flow

    return "maf" if name == "sbi" else coupling_flow()


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


def quality(posterior: Any, observations: Tensor, n: int) -> list[float]:
    """C2ST at each observation, of n samples against n exact ones."""
    from sbi.utils.metrics import c2st

    scores = []
    for x in observations:
        samples = posterior.sample((n,), x=x[None], show_progress_bars=False)
        scores.append(float(c2st(exact_posterior(x, n), samples)))
    return scores


def measure(
    make: Callable[[str], Any], names: Sequence[str], seeds: int, simulations: int, samples: int, observations: Tensor
) -> dict[str, list[dict[str, Any]]]:
    """Every estimator's runs, one a seed; in turn, so that a machine's noise meets all of them."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names if seed % 2 == 0 else reversed(names):
            posterior, run = train(make(name), seed, simulations)
            run["c2st"] = statistics.mean(quality(posterior, observations, samples))
            runs[name].append(run)
            print(
                f"seed {seed}, {name}: C2ST {run['c2st']:.3f}, {run['seconds']:.1f} s, {run['epochs']} epochs, "
                f"−log q {run['loss']:.3f}",
                flush=True,
            )
    return runs


def results(runs: dict[str, list[dict[str, Any]]], simulations: int) -> list[dict[str, Any]]:
    """Rows in the scheme of `bench.results`: seconds of training as stats, the rest as info."""
    rows = []
    for name, found in runs.items():
        seconds = [run["seconds"] for run in found]
        quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        scores = [run["c2st"] for run in found]
        rows.append(
            {
                "name": f"two-moons-{name}",
                "stats": {
                    "min": min(seconds), "q1": quartiles[0], "median": quartiles[1], "q3": quartiles[2],
                    "max": max(seconds), "rounds": len(seconds),
                },
                "info": {
                    "case": "two-moons", "mode": "npe", "provider": name, "threads": torch.get_num_threads(),
                    "simulations": simulations, "batch": 200, "parameters": found[0]["parameters"],
                    "c2st": statistics.mean(scores), "c2st_runs": scores, "epochs": [run["epochs"] for run in found],
                    "loss": [run["loss"] for run in found],
                },
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.two_moons", description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=2_000)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    warnings.filterwarnings("ignore", module="sbi|sklearn")
    runs = measure(estimator, ESTIMATORS, arguments.seeds, arguments.simulations, arguments.samples, OBSERVATIONS)
    rows = results(runs, arguments.simulations)
    for row in rows:
        scores = row["info"]["c2st_runs"]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        print(
            f"{row['info']['provider']}: C2ST {row['info']['c2st']:.3f} ± {spread:.3f}, {row['stats']['median']:.1f} s of training"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps({**machine(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
