"""Who is timed, and how: in turn, after a check, long calls as well as short ones."""

import itertools
import time

import pytest

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
