"""Who is timed, and how: in turn, after a check, long calls as well as short ones."""

import itertools
import math
import time

import pytest
import torch

from bench import walltime
from bench.walltime import Contestant, compete, interleave


def test_only_what_is_right_is_timed() -> None:
    calls = []

    def crash() -> str:
        raise RuntimeError("no such kernel")

    found = compete(
        {
            "right": Contestant(lambda: calls.append("right"), lambda: ""),
            "wrong": Contestant(lambda: calls.append("wrong"), lambda: "result 0 is off by 1.0e-01"),
            "broken": Contestant(lambda: calls.append("broken"), crash),
        },
        0.0,
    )
    assert isinstance(found["right"], list) and all(seconds >= 0 for seconds in found["right"])
    assert found["wrong"] == "result 0 is off by 1.0e-01" and found["broken"] == "RuntimeError: no such kernel"
    assert set(calls) == {"right"}


def test_all_take_turns_and_a_stretch_of_noise_meets_all(monkeypatch) -> None:
    order = []

    def pause(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    times = interleave({"short": lambda: pause("short", 1e-3), "long": lambda: pause("long", 3e-2)}, 0.0)
    assert len(times["long"]) == walltime.LEAST_BURSTS and min(times["long"]) >= 3e-2
    assert len(times["short"]) >= walltime.LEAST_BURSTS
    timed = order[order.index("long") + walltime.WARMUP :]
    changes = sum(a != b for a, b in itertools.pairwise(timed))
    assert changes == 2 * walltime.LEAST_BURSTS - 1


def test_the_clock_shows_what_was_measured() -> None:
    shown = walltime._replay([0.5, 0.25])
    ticks = list(shown)
    assert [ticks[1] - ticks[0], ticks[3] - ticks[2]] == pytest.approx([0.5, 0.25])


def test_the_matrix_rate_is_the_best_call_of_several_shapes(monkeypatch) -> None:
    """A shape that is slow in this moment, or always, is no ruler; every row gets the same one."""
    seconds = []

    def measured(functions, budget: float) -> dict:
        seconds.append(budget)
        for f in functions.values():
            assert f().dtype == torch.float32  # the products themselves
        # 1 GFLOP/s, but for one call of glf-cifar's shape: 5.
        return {s: [2e-9 * math.prod(s)] * 3 + [4e-10 * math.prod(s)] * (s == (256, 256, 256)) for s in functions}

    monkeypatch.setattr(walltime, "interleave", measured)
    walltime.matrix_rate.cache_clear()
    try:
        assert walltime.matrix_rate() == pytest.approx(5e9)
        assert walltime.matrix_rate() == pytest.approx(5e9) and seconds == [3.0]
    finally:
        walltime.matrix_rate.cache_clear()
    assert {(256, 256, 256), (4096, 512, 512)} <= {*walltime.PRODUCTS}  # glf-cifar's and wide's
