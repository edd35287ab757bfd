"""Simulation-based inference: sbi's NPE with a coupling flow as its density estimator, on two moons.

    python examples/npe_two_moons.py [--quick] [--out FOLDER]

In two moons, the posterior of two parameters is a pair of crescents (arXiv:2101.04653, appendix T.8). All code is that of sbi,
except for `density_estimator=coupling_flow()`. Needs `pip install sbi`.
"""

import argparse
import math
import os
import time
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform
from torch import Tensor

from glf_fast.integrations.sbi import coupling_flow


def crescent(n: int) -> Tensor:
    """Points (n, 2) on a noisy half circle."""
    angle, radius = math.pi * (torch.rand(n) - 0.5), 0.1 + 0.01 * torch.randn(n)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)


def simulate(theta: Tensor) -> Tensor:
    """Simulated x (N, 2) of parameters θ (N, 2)."""
    total, difference = theta.sum(1), theta[:, 1] - theta[:, 0]
    return crescent(len(theta)) + torch.stack([-total.abs(), difference], 1) / math.sqrt(2)


def exact(n: int) -> Tensor:
    """Samples (n, 2) of the posterior at x = 0, by drawing points of the crescent and solving the simulator for θ."""
    moved = -math.sqrt(2) * crescent(n)
    total = moved[:, 0] * (2 * torch.randint(2, (n,)) - 1)
    return torch.stack([total - moved[:, 1], total + moved[:, 1]], 1) / 2


def main() -> None:
    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.out)  # sbi writes its logs here
    warnings.filterwarnings("ignore", message="Maximum number of epochs")  # with --quick
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    torch.manual_seed(0)
    theta = prior.sample((500 if arguments.quick else 5000,))
    x = simulate(theta)

    samples, seconds, loss = {"exact": exact(3000)}, {}, {}
    for name, estimator in {"sbi's default (maf)": "maf", "glf_fast": coupling_flow()}.items():
        torch.manual_seed(1)
        trainer = NPE(prior, density_estimator=estimator, show_progress_bars=True)
        trainer.append_simulations(theta, x)
        start = time.perf_counter()
        trainer.train(max_num_epochs=3 if arguments.quick else 1000)
        seconds[name], loss[name] = time.perf_counter() - start, trainer.summary["best_validation_loss"][-1]
        posterior = trainer.build_posterior()
        samples[name] = posterior.sample((3000,), x=torch.zeros(1, 2), show_progress_bars=False)

    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharex=True, sharey=True)
    for axis, (name, points) in zip(axes, samples.items(), strict=True):
        axis.scatter(*points.T, s=2, alpha=0.4)
        note = f", {seconds[name]:.0f} s" if name in seconds else ""
        axis.set(title=name + note, xlabel="θ₁", ylabel="θ₂", xlim=(-0.6, 0.6), ylim=(-0.6, 0.6), aspect="equal")
    figure.savefig("npe_two_moons.png", dpi=120, bbox_inches="tight")
    print()
    for name in seconds:
        print(f"{name}: {seconds[name]:.1f} s of training, −log q of validation simulations {loss[name]:.3f} nats")
    default, ours = seconds
    print(
        f"gained: {seconds[default] / seconds[ours]:.1f} times faster, {loss[default] - loss[ours]:.3f} nats; "
        f"see {arguments.out / 'npe_two_moons.png'}"
    )


if __name__ == "__main__":
    main()
