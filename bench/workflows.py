"""BayesFlow's coupling flow and glf_fast's as inference networks: `python -m bench.workflows --out FILE.json`.

Steps of a workflow's training on simulations that are there, and 10,000 samples of one posterior, in turn with both; medians.
Both have the defaults of bayesflow: 6 pairs of couplings, networks of two layers of 128. Needs bayesflow (`make communities`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import about
from bench.results import Result, Results, stats, write

__all__ = ["measure", "table"]

SIMULATIONS, BATCH, SAMPLES = 1280, 128, 10_000


def _workflow(provider: str, simulations: dict[str, Any]) -> Any:
    import bayesflow

    from glf_fast.integrations.bayesflow import CouplingFlow

    network = CouplingFlow() if provider == "glf_fast" else bayesflow.networks.CouplingFlow()
    workflow = bayesflow.BasicWorkflow(
        inference_network=network, inference_variables=["theta"], inference_conditions=["x"]
    )
    workflow.fit_offline(simulations, epochs=1, batch_size=BATCH, verbose=0)
    return workflow


def measure(dim: int, rounds: int) -> Iterator[Result]:
    """The rows of one number of parameters: providers "bayesflow" and "glf_fast", modes "train" (a step) and "sample"."""
    theta = np.random.default_rng(0).normal(size=(SIMULATIONS, dim)).astype(np.float32)
    simulations = {
        "theta": theta,
        "x": theta + 0.5 * np.random.default_rng(1).normal(size=theta.shape).astype(np.float32),
    }
    both = {provider: _workflow(provider, simulations) for provider in ("bayesflow", "glf_fast")}
    times: dict[tuple[str, str], list[float]] = {}
    for i in range(rounds + 1):
        for provider in both if i % 2 else reversed(both):
            start = time.perf_counter()
            both[provider].fit_offline(simulations, epochs=1, batch_size=BATCH, verbose=0)
            middle = time.perf_counter()
            both[provider].sample(num_samples=SAMPLES, conditions={"x": simulations["x"][:1]})
            end = time.perf_counter()
            if i:  # the first round warms up
                times.setdefault(("train", provider), []).append((middle - start) * BATCH / SIMULATIONS)
                times.setdefault(("sample", provider), []).append(end - middle)
    for (mode, provider), seconds in times.items():
        yield Result("workflows", f"{dim} parameters", mode, provider, stats(seconds), {})


def table(results: Results) -> Iterator[str]:
    """The medians in milliseconds, and how many times as long bayesflow's network takes."""
    yield "| workflow | | bayesflow, ms | glf_fast, ms | × |"
    yield "|---|---|---|---|---|"
    for (_, case, mode), rows in results.groups().items():
        before, after = (rows[provider].median for provider in ("bayesflow", "glf_fast"))
        yield f"| {case} | {mode} | {1e3 * before:.1f} | {1e3 * after:.1f} | {before / after:.2f} |"


def main() -> None:
    """Measure, write the file, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of the results")
    parser.add_argument("--rounds", type=int, default=9, help="times that each is run")
    arguments = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    rows = [row for dim in (4, 10) for row in measure(dim, arguments.rounds)]
    found = Results(about(), datetime.now(timezone.utc).isoformat(), rows)
    write(found, arguments.out)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
