"""Tasks of simulation-based inference whose posteriors can be sampled exactly, and sbi's NPE on them: its time and quality.

The tasks are three of "Benchmarking simulation-based inference" (Lueckmann et al., arXiv:2101.04653, appendix T): two moons,
SLCP and the Gaussian with a linear mean. Quality is C2ST by sbi's own function.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

__all__ = ["TASKS", "Task", "c2st", "elsewhere", "exact_samples", "train"]

OBSERVED = 5  # number of observations of a task
ROOM = 25.0  # log-density below the largest, beyond which SLCP's variances are not looked at


@dataclass(frozen=True)
class Task:
    """A prior of θ (D), a simulator, and the posterior it gives."""

    name: str
    prior: Callable[[], Distribution]
    simulate: Callable[[Tensor], Tensor]  # θ (N, D) → x (N, C)
    posterior: Callable[[Tensor, int], Tensor]  # x (C), n → n exact and independent samples (n, D) of p(θ | x)
    given: tuple[tuple[float, ...], ...] = ()  # observations; none: some that the simulator makes

    def observations(self) -> Tensor:
        """Observations (5, C), always the same."""
        if self.given:
            return torch.tensor(self.given)
        with _seeded(0):
            return self.simulate(self.prior().sample((OBSERVED,)))


# -- two moons ----------------------------------------------------------------------------------------------------------


def _crescent(n: int) -> Tensor:
    angle, radius = math.pi * (torch.rand(n) - 0.5), 0.1 + 0.01 * torch.randn(n)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)


def _moons(theta: Tensor) -> Tensor:
    """A crescent, moved by (−|θ₁ + θ₂|, θ₂ − θ₁)/√2."""
    total, difference = theta.sum(1), theta[:, 1] - theta[:, 0]
    return _crescent(len(theta)) + torch.stack([-total.abs(), difference], 1) / math.sqrt(2)


def _moons_posterior(x: Tensor, n: int) -> Tensor:
    """The crescent is drawn, and the move solved for θ."""
    found: list[Tensor] = []
    while sum(map(len, found)) < n:
        moved = math.sqrt(2) * (x - _crescent(4 * n))
        total = moved[:, 0] * (2 * torch.randint(2, (len(moved),)) - 1)
        theta = torch.stack([total - moved[:, 1], total + moved[:, 1]], 1) / 2
        found.append(theta[(moved[:, 0] <= 0) & (theta.abs() <= 1).all(1)])
    return torch.cat(found)[:n]


# -- SLCP: a simple likelihood, a complex posterior -----------------------------------------------------------------------


def _slcp(theta: Tensor) -> Tensor:
    """Four points of a normal distribution in the plane: mean (θ₁, θ₂), deviations θ₃² and θ₄², correlation tanh θ₅."""
    s, rho = theta[:, None, 2:4].square(), theta[:, None, 4].tanh()
    a, b = torch.randn(2, len(theta), 4)
    noise = torch.stack([a, rho * a + (1 - rho.square()).sqrt() * b], 2)
    return (theta[:, None, :2] + s * noise).flatten(1)


def _slcp_posterior(x: Tensor, n: int) -> Tensor:
    """The shape (θ₃, θ₄, θ₅) from a fine grid with rejection, the mean given the shape, and the signs of θ₃ and θ₄.

    With W = Σ (xᵢ − x̄)(xᵢ − x̄)ᵀ, and the prior's box for the mean left aside, p(θ₃, θ₄, θ₅ | x) ∝ |S|^(−3/2) exp(−tr(S⁻¹W)/2)
    and the mean is N(x̄, S/4). Of both together, what is outside of the box is rejected. The grid is one of log θ₃ and log θ₄,
    in which the posterior is equally wide for all x.
    """
    points = x.double().view(4, 2)
    mean = points.mean(0)
    W = (points - mean).T @ (points - mean)

    def log_density(shape: Tensor) -> Tensor:
        """Log of the density of (log θ₃, log θ₄, θ₅), but for a constant."""
        u, rho = shape[..., :2], shape[..., 2].tanh()
        s = (2 * u).exp()
        rest = 1 - rho.square()
        trace = W[0, 0] / s[..., 0] ** 2 + W[1, 1] / s[..., 1] ** 2 - 2 * rho * W[0, 1] / s.prod(-1)
        return u.sum(-1) - 3 * s.log().sum(-1) - 1.5 * rest.log() - trace / rest / 2

    # A variance below Wᵢᵢ/120 has a density of e⁻⁵⁰ of the largest, or less.
    low = torch.stack([(W[0, 0] / 120).log() / 4, (W[1, 1] / 120).log() / 4, torch.tensor(-3.0).double()])
    high = torch.tensor([math.log(3), math.log(3), 3.0]).double()
    counts = (96, 96, 96)
    cell = (high - low) / torch.tensor(counts)
    axes = [low[i] + cell[i] * (torch.arange(counts[i]) + 0.5) for i in range(3)]
    centres = torch.cartesian_prod(*axes)
    at_centres = log_density(centres)
    kept = at_centres > at_centres.max() - ROOM
    centres, at_centres = centres[kept], at_centres[kept]
    chances = (at_centres - at_centres.max()).exp()

    found: list[Tensor] = []
    while sum(map(len, found)) < n:
        index = torch.multinomial(chances, 4 * n, replacement=True)
        shape = centres[index] + cell * (torch.rand(4 * n, 3).double() - 0.5)
        ratio = (log_density(shape) - at_centres[index]).exp()
        shape = shape[torch.rand(4 * n) * ratio.max() < ratio]
        theta, rho = shape[:, :2].exp() * (2 * torch.randint(2, (len(shape), 2)) - 1), shape[:, 2].tanh()
        a, b = torch.randn(2, len(shape)).double()
        noise = torch.stack([a, rho * a + (1 - rho.square()).sqrt() * b], 1)
        theta = torch.cat([mean + theta.square() * noise / 2, theta, shape[:, 2:]], 1)
        found.append(theta[(theta[:, :2].abs() <= 3).all(1)])
    return torch.cat(found)[:n].float()


# -- a Gaussian with a linear mean ----------------------------------------------------------------------------------------


def _normal_prior() -> Distribution:
    return MultivariateNormal(torch.zeros(10), 0.1 * torch.eye(10))


def _box(dim: int, bound: float) -> Distribution:
    from sbi.utils import BoxUniform

    return BoxUniform(-bound * torch.ones(dim), bound * torch.ones(dim))


TASKS = {
    task.name: task
    for task in (
        Task(
            "two moons", lambda: _box(2, 1), _moons, _moons_posterior,
            ((0.0, 0.0), (-0.4, 0.3), (-0.8, -0.2), (-0.2, -0.6), (-0.6, 0.6)),  # over the range of what the simulator makes
        ),
        Task("SLCP", lambda: _box(5, 3), _slcp, _slcp_posterior),
        Task(
            "Gaussian linear", _normal_prior,
            lambda theta: theta + math.sqrt(0.1) * torch.randn_like(theta),
            lambda x, n: x / 2 + math.sqrt(0.05) * torch.randn(n, 10),
        ),
    )
}  # fmt: skip


# -- NPE ------------------------------------------------------------------------------------------------------------------


def train(
    task: Task,
    density_estimator: Any,
    seed: int,
    simulations: int,
    by: Callable[..., Any] | None = None,
    **settings: Any,
) -> tuple[Any, dict[str, Any]]:
    """A posterior from that many simulations, and what it took. `by` trains in place of sbi's own loop."""
    from sbi.inference import NPE

    torch.manual_seed(seed)
    prior = task.prior()
    theta = prior.sample((simulations,))
    trainer = NPE(prior, density_estimator=density_estimator, show_progress_bars=False)
    trainer.append_simulations(theta, task.simulate(theta))
    start = time.perf_counter()
    trained = by(trainer, **settings) if by else trainer.train(**settings)
    seconds = time.perf_counter() - start
    summary = trainer.summary
    return trainer.build_posterior(trained), {
        "seconds": seconds,
        "epochs": summary["epochs_trained"][-1],
        "loss": summary["best_validation_loss"][-1],
        "parameters": sum(p.numel() for p in trained.parameters()),
    }


@cache
def exact_samples(task: Task, observation: int, n: int) -> Tensor:
    """n samples of the posterior of an observation, always the same."""
    with _seeded(observation):
        return task.posterior(task.observations()[observation], n)


def c2st(task: Task, samples: list[Tensor]) -> list[float]:
    """Accuracy of a classifier that tells samples for each observation from exact ones, as many; 0.5 is perfect."""
    from sbi.utils import metrics

    cores = {"n_jobs": -1}  # all of them, for the same forest
    return [
        float(metrics.c2st(exact_samples(task, i, len(drawn)), drawn, classifier_kwargs=cores))
        for i, drawn in enumerate(samples)
    ]


@contextmanager
def elsewhere() -> Iterator[None]:
    """In a temporary folder: sbi writes its logs where it is."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of this seed inside, and those of before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
