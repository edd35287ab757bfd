"""Who is timed on a processor, and how: in turn, after a check, long calls as well as short ones."""

import itertools
import math
import time

import pytest
import torch

from bench import processor_clock
from bench.memory import MemoryCase
from bench.processor_clock import call_times
from bench.race import Calls, Job, Provider, Race
from bench.test_processor import Tape, outcomes


def test_only_what_is_right_is_timed() -> None:
    calls: list[str] = []

    def provider(name: str, wrong: str) -> Provider:
        return Provider(name, lambda *_: Job(lambda: calls.append(name), lambda _: wrong))

    def crash(*_: object) -> Job:
        raise RuntimeError("no such kernel")

    def late(*_: object) -> Job:
        results = iter([None])
        return Job(lambda: next(results), lambda _: "")  # fails while it is timed

    providers = (provider("right", ""), provider("wrong", "result 0 is off by 1.0e-01"))
    race = Race("a", MemoryCase(0), "b", (*providers, Provider("broken", crash), Provider("late", late)), 0.0)
    found = outcomes(race)
    assert all(seconds >= 0 for seconds in found["right"].seconds) and found["right"].result.key == (
        "a",
        "memory-0",
        "b",
    )
    assert str(found["wrong"]) == "result 0 is off by 1.0e-01" and calls.count("wrong") == 1
    assert str(found["broken"]) == "no such kernel" and isinstance(found["late"], StopIteration)


def test_all_take_turns_and_a_stretch_of_noise_meets_all(monkeypatch) -> None:
    order = []

    def pause(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    found = call_times({"short": lambda: pause("short", 1e-3), "long": lambda: pause("long", 3e-2)}, 0.0)
    times = {name: calls.seconds for name, calls in found.items()}
    assert len(times["long"]) == processor_clock.LEAST and min(times["long"]) >= 3e-2
    assert len(times["short"]) >= processor_clock.LEAST
    timed = order[order.index("long") + processor_clock.WARMUP :]
    changes = sum(a != b for a, b in itertools.pairwise(timed))
    assert changes == 2 * processor_clock.LEAST - 1


def test_the_timer_shows_what_was_measured() -> None:
    tape = Tape()
    tape.insert([0.5, 0.25])
    ticks = [tape() for _ in range(4)]
    assert [ticks[1] - ticks[0], ticks[3] - ticks[2]] == pytest.approx([0.5, 0.25])


def test_the_matrix_rate_is_the_best_call_of_several_shapes(monkeypatch) -> None:
    """A shape that is slow in this moment, or always, is no ruler; every row gets the same one."""
    seconds = []

    def measured(functions, budget: float) -> dict:
        seconds.append(budget * len(functions))
        for f in functions.values():
            assert f().dtype == torch.float32  # the products themselves
        # 1 GFLOP/s, but for one call of glf-cifar's shape: 5.
        return {
            s: Calls([2e-9 * math.prod(s)] * 3 + [4e-10 * math.prod(s)] * (s == (256, 256, 256))) for s in functions
        }

    monkeypatch.setattr(processor_clock, "call_times", measured)
    processor_clock.matrix_rate.cache_clear()
    try:
        assert processor_clock.matrix_rate() == pytest.approx(5e9)
        assert processor_clock.matrix_rate() == pytest.approx(5e9) and seconds == pytest.approx([3.0])
    finally:
        processor_clock.matrix_rate.cache_clear()
    assert {(256, 256, 256), (4096, 512, 512)} <= {*processor_clock.PRODUCTS}  # glf-cifar's and wide's
