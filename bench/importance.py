"""MadNIS' integrator with its own flow and with glf_fast's: `python -m bench.importance --out FILE.json`.

Steps of training, and 100,000 samples with their probabilities, in turn with both; medians. The integrand is a product of
Gaussians, which costs next to nothing. The flows have MadNIS' defaults: 2·⌈log₂ D⌉ couplings of splines of 10 bins, networks of
3 layers of 32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import about
from bench.results import Result, Results, stats, write

__all__ = ["measure", "table"]

STEPS, SAMPLES = 10, 100_000
CASES = {"4 dimensions": (4, None), "8 dimensions": (8, None), "8 dimensions, 16 channels": (8, 16)}


def _integrator(provider: str, dim: int, channels: int | None) -> Any:
    import madnis.integrator
    import madnis.nn

    from glf_fast.integrations.madnis import Flow

    def peak(x: Tensor) -> Tensor:
        return torch.exp(-50 * (x - 0.5).square().sum(1))

    def of_channels(x: Tensor, channel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return peak(x), x, torch.full((len(x), channels or 1), 1 / (channels or 1), dtype=x.dtype)

    torch.manual_seed(0)
    flow = Flow(dim, channels) if provider == "glf_fast" else madnis.nn.Flow(dim, channels=channels)
    integrand = peak
    if channels:
        integrand = madnis.integrator.Integrand(
            of_channels, input_dim=dim, channel_count=channels, remapped_dim=dim, has_channel_weight_prior=True
        )
    return madnis.integrator.Integrator(integrand, dims=dim, flow=flow, batch_size=1024, train_channel_weights=False)


def measure(rounds: int) -> Iterator[Result]:
    """The rows: providers "madnis" and "glf_fast", modes "train" (a step) and "sample"."""
    for case, (dim, channels) in CASES.items():
        both = {provider: _integrator(provider, dim, channels) for provider in ("madnis", "glf_fast")}
        times: dict[tuple[str, str], list[float]] = {}
        for i in range(rounds + 1):
            for provider in both if i % 2 else reversed(both):
                integrator = both[provider]
                channel = torch.randint(channels, (SAMPLES,)) if channels else None
                start = time.perf_counter()
                integrator.train(STEPS)
                middle = time.perf_counter()
                with torch.no_grad():
                    integrator.flow.sample(SAMPLES, channel=channel, return_prob=True)
                end = time.perf_counter()
                if i:  # the first round warms up
                    times.setdefault(("train", provider), []).append((middle - start) / STEPS)
                    times.setdefault(("sample", provider), []).append(end - middle)
        for (mode, provider), seconds in times.items():
            found = both[provider].integration_metrics(10_000)
            yield Result("importance", case, mode, provider, stats(seconds), {"rel_stddev": float(found.rel_stddev)})


def table(results: Results) -> Iterator[str]:
    """The medians in milliseconds, and how many times as long madnis' flow takes."""
    yield "| integrand | | madnis, ms | glf_fast, ms | × | relative standard deviations |"
    yield "|---|---|---|---|---|---|"
    for (_, case, mode), rows in results.groups().items():
        before, after = rows["madnis"], rows["glf_fast"]
        spread = " and ".join(f"{row.info['rel_stddev']:.3f}" for row in (before, after))
        yield (
            f"| {case} | {mode} | {1e3 * before.median:.1f} | {1e3 * after.median:.1f} | "
            f"{before.median / after.median:.2f} | {spread} |"
        )


def main() -> None:
    """Measure, write the file, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of the results")
    parser.add_argument("--rounds", type=int, default=9, help="times that each is run")
    arguments = parser.parse_args()
    found = Results(about(), datetime.now(timezone.utc).isoformat(), list(measure(arguments.rounds)))
    write(found, arguments.out)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
