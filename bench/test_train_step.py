"""A whole GLF step on a processor, in images per second: the presets' models, ours against plain PyTorch and torch.compile.

    pytest bench/test_train_step.py --benchmark-only

Convolutions and the dense layers of the autoencoder take most of such a step; they are torch's in all three.
"""

from __future__ import annotations

import statistics
from functools import cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.training import IMAGES, PROVIDERS, Step
from bench.walltime import Contestant, compete, report

SECONDS = 6.0  # for all providers of a preset


@cache
def times(preset: str) -> tuple[dict[str, list[float] | str], int]:
    """Seconds of every provider's steps, measured in turn, or what is wrong with it; images in a step."""
    steps = {name: Step(name, preset) for name in PROVIDERS}
    found = compete({name: Contestant(step.run, step.why_wrong) for name, step in steps.items()}, SECONDS)
    return found, len(steps["glf_fast"].images)


@pytest.mark.parametrize("preset", IMAGES)
@pytest.mark.parametrize("name", PROVIDERS)
def test_train_step(name: str, preset: str, benchmark: BenchmarkFixture) -> None:
    all_found, batch = times(preset)
    found = all_found[name]
    rate = batch / statistics.median(found) if isinstance(found, list) else 0.0
    report(benchmark, found, case=preset, mode="step", provider=name, batch=batch, images_per_s=rate)
