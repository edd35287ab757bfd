"""Nats per row that flows of one size have learnt after so many seconds: `python -m bench.densities`; nobody's default suite.

Three data sets have a known density p, so that what is lost, the mean of log p − log q over test rows, is known. The fourth is
a table of scikit-learn, of which −log q alone can be said. All columns are standardised. Every library trains a coupling flow
of splines (8 steps, 64 × 64, 8 bins) by Adam at 1e-3 on batches of 256, validates after each epoch, and keeps its best weights:
ours by `glf_fast.fit`, flowjax by a jitted step after its compilation, the others by the usual loop.

Seconds are those of the processor on one thread, so that neighbours cost little; each fit is a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glf_fast
from bench.cases import FlowCase
from bench.libraries import LIBRARIES, Density, flowjax

__all__ = ["DATA", "PROVIDERS", "lost"]

ROWS = {"train": 10_000, "validation": 2_000, "test": 5_000}
BATCH, RATE = 256, 1e-3
LogDensity = Callable[[Tensor], Tensor]


# -- data -----------------------------------------------------------------------------------------------------------------


def _mixture(n: int) -> tuple[Tensor, LogDensity]:
    """Eight normal distributions in six dimensions."""
    means, factors = 3 * torch.randn(8, 6), torch.linalg.qr(torch.randn(8, 6, 6))[0] * (0.2 + torch.rand(8, 1, 6))
    normals = torch.distributions.MultivariateNormal(means, factors @ factors.mT)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(8)), normals)
    return mixture.sample((n,)), mixture.log_prob


def _bananas(n: int) -> tuple[Tensor, LogDensity]:
    """A chain of eight, each a normal distribution of deviation 0.3 around (the last one squared − 1) / 2."""
    columns = [torch.randn(n)]
    while len(columns) < 8:
        columns.append((columns[-1].clamp(-3, 3).square() - 1) / 2 + 0.3 * torch.randn(n))

    def log_prob(x: Tensor) -> Tensor:
        mean = torch.cat([torch.zeros(len(x), 1), (x[:, :-1].clamp(-3, 3).square() - 1) / 2], 1)
        return torch.distributions.Normal(mean, torch.tensor([1.0] + [0.3] * 7)).log_prob(x).sum(1)

    return torch.stack(columns, 1), log_prob


def _spiral(n: int) -> tuple[Tensor, LogDensity]:
    """A spiral of width 0.05 beside four normal columns, turned at random in six dimensions."""
    turn, width = torch.linalg.qr(torch.randn(6, 6))[0], 0.05

    def curve(u: Tensor) -> Tensor:
        return torch.stack([u.cos(), u.sin()], 1) * u[:, None] / 5

    points = curve(torch.linspace(1, 10, 4001))
    x = torch.cat([curve(1 + 9 * torch.rand(n)) + width * torch.randn(n, 2), torch.randn(n, 4)], 1) @ turn

    def log_prob(x: Tensor) -> Tensor:
        x = x @ turn.T
        square = torch.cdist(x[:, :2].double(), points.double()).square()
        on_curve = torch.logsumexp(-square / (2 * width**2), 1) - math.log(len(points) * 2 * math.pi * width**2)
        return on_curve.float() + torch.distributions.Normal(0.0, 1.0).log_prob(x[:, 2:]).sum(1)

    return x, log_prob


def _breast_cancer(n: int) -> tuple[Tensor, None]:
    """The 30 measurements of 569 tumours, in scikit-learn's copy of the Wisconsin table."""
    from sklearn.datasets import load_breast_cancer

    x = torch.from_numpy(load_breast_cancer().data).float()
    return x[torch.randperm(len(x))], None


DATA: dict[str, Callable[[int], tuple[Tensor, LogDensity | None]]] = {
    "mixture": _mixture, "bananas": _bananas, "spiral": _spiral, "breast_cancer": _breast_cancer,
}  # fmt: skip


def data(name: str) -> tuple[dict[str, Tensor], LogDensity | None]:
    """The standardised rows of each split, and their log-density, if it is known."""
    torch.manual_seed(0)
    raw, raw_log_prob = DATA[name](sum(ROWS.values()))
    mean, std = raw.mean(0), raw.std(0)
    x = (raw - mean) / std

    def log_prob(x: Tensor) -> Tensor:
        assert raw_log_prob is not None
        return raw_log_prob(x * std + mean) + std.log().sum()

    shares = [round(len(x) * rows / sum(ROWS.values())) for rows in ROWS.values()]
    shares[0] += len(x) - sum(shares)
    return dict(zip(ROWS, x.split(shares), strict=True)), log_prob if raw_log_prob else None


# -- fits: rows, case, seconds → log q of the test rows, epochs ---------------------------------------------------------


def _ours(rows: dict[str, Tensor], case: FlowCase, seconds: float) -> tuple[Tensor, int]:
    flow = glf_fast.CouplingFlow(case.dim, case.steps, case.hidden, coupling="spline", spline={"bins": case.bins})
    end = time.process_time() + seconds
    result = glf_fast.fit(
        flow, rows["train"], validation=(rows["validation"], None), epochs=10**6, batch_size=case.batch, lr=RATE,
        callback=lambda _: time.process_time() > end, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        return flow.log_prob(rows["test"]), len(result.training_loss)


def _library(name: str, rows: dict[str, Tensor], case: FlowCase, seconds: float) -> tuple[Tensor, int]:
    density: Density = LIBRARIES[name].flow(case, "cpu")
    module, x = density.module, rows["train"]
    optimizer = torch.optim.Adam(module.parameters(), RATE, fused=True)
    with torch.no_grad():
        density.log_prob(x[:256], None)  # the start of layers that depend on data
    best, least, epochs, end = module.state_dict(), math.inf, 0, time.process_time() + seconds
    while time.process_time() < end:
        module.train()
        for index in torch.randperm(len(x))[: len(x) // case.batch * case.batch].split(case.batch):
            optimizer.zero_grad()
            (-density.log_prob(x[index], None).mean()).backward()
            optimizer.step()
        epochs += 1
        module.eval()
        with torch.no_grad():
            loss = -float(density.log_prob(rows["validation"], None).mean())
        if loss < least:
            best, least = copy.deepcopy(module.state_dict()), loss
    module.load_state_dict(best)
    with torch.no_grad():
        return density.log_prob(rows["test"], None), epochs


def _flowjax(rows: dict[str, Tensor], case: FlowCase, seconds: float) -> tuple[Tensor, int]:
    import equinox
    import jax
    import optax
    import paramax

    flow = flowjax.new_flow(case)
    parameters, rest = equinox.partition(
        flow, equinox.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    optimizer = optax.adam(RATE)
    arrays = {split: jax.numpy.asarray(x.numpy()) for split, x in rows.items()}

    def log_prob(parameters: Any, x: Any) -> Any:
        return paramax.unwrap(equinox.combine(parameters, rest)).log_prob(x)

    @jax.jit
    def step(parameters: Any, state: Any, x: Any) -> Any:
        gradients = jax.grad(lambda p: -log_prob(p, x).mean())(parameters)
        updates, state = optimizer.update(gradients, state)
        return equinox.apply_updates(parameters, updates), state

    scored = jax.jit(log_prob)
    state = optimizer.init(parameters)
    jax.block_until_ready(
        (step(parameters, state, arrays["train"][: case.batch]), scored(parameters, arrays["validation"]))
    )
    best, least, epochs, end = parameters, math.inf, 0, time.process_time() + seconds
    n = len(rows["train"])
    while time.process_time() < end:
        for index in torch.randperm(n)[: n // case.batch * case.batch].split(case.batch):
            parameters, state = step(parameters, state, arrays["train"][index.numpy()])
        epochs += 1
        loss = -float(scored(parameters, arrays["validation"]).mean())
        if loss < least:
            best, least = parameters, loss
    return torch.tensor(scored(best, arrays["test"]).tolist()), epochs


PROVIDERS: dict[str, Callable[[dict[str, Tensor], FlowCase, float], tuple[Tensor, int]]] = {
    "glf_fast": _ours,
    **{
        name: lambda rows, case, seconds, name=name: _library(name, rows, case, seconds)  # type: ignore[misc]
        for name in ("normflows", "zuko")
    },
    "flowjax": _flowjax,
}


def lost(provider: str, name: str, seconds: float) -> dict[str, float]:
    """Nats per test row that a fit has lost, or −log q where p is not known, their standard error, and epochs."""
    rows, log_prob = data(name)
    case = FlowCase(name, rows["train"].shape[1], (64, 64), 8, min(BATCH, len(rows["train"]) // 4), bins=8)
    torch.manual_seed(1)
    found, epochs = PROVIDERS[provider](rows, case, seconds)
    nats = -found if log_prob is None else log_prob(rows["test"]) - found
    return {"nats": float(nats.mean()), "error": float(nats.std()) / math.sqrt(len(nats)), "epochs": epochs}


def main() -> None:
    """Print a table: every library on every data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of training, in each fit")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "DATA"), help="print the result of one fit as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        provider, name = arguments.one
        print(json.dumps(lost(provider, name, arguments.seconds)))
        return
    threads = {"OMP_NUM_THREADS": "1", "NPROC": "1", "JAX_PLATFORMS": "cpu"}
    print(f"| | {' | '.join(DATA)} |\n|---|{'---|' * len(DATA)}")
    for provider in PROVIDERS:
        cells = []
        for name in DATA:
            command = [
                sys.executable,
                "-m",
                "bench.densities",
                "--seconds",
                str(arguments.seconds),
                "--one",
                provider,
                name,
            ]
            done = subprocess.run(
                command, env={**os.environ, **threads}, capture_output=True, text=True, cwd=Path(__file__).parent.parent
            )
            if done.returncode:
                cells.append((done.stderr.strip().splitlines() or ["failed"])[-1])
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            cells.append(f"{found['nats']:.3f} ± {found['error']:.3f} ({found['epochs']} epochs)")
        print(f"| {provider} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
