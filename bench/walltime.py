"""Wall times on a processor: contestants interleaved in one run, and the machine's own rates beside them."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

__all__ = [
    "THREADS",
    "Contestant",
    "bandwidth",
    "compete",
    "copy_bandwidth",
    "interleave",
    "matrix_rate",
    "quick",
    "report",
    "yardstick",
]

THREADS = int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads()
WARMUP = 3
BURST = 0.02  # seconds
LEAST_BURSTS = 3

Name = TypeVar("Name", bound=Hashable)

_quick = False


def quick() -> None:
    """From now on, measure as little as possible: to see that everything runs (`pytest bench --quick`)."""
    global _quick
    _quick = True


@dataclass(frozen=True)
class Contestant:
    """Something to time, and what says why its results are not the reference's, or ""."""

    run: Callable[[], object]
    why_wrong: Callable[[], str]


def compete(contestants: Mapping[str, Contestant], seconds: float) -> dict[str, list[float] | str]:
    """Check all, then time those that are right, interleaved: name → seconds of each call, or what is wrong."""
    torch.compiler.reset()  # what earlier cases compiled would make this one's calls slower, see bench.compiler
    wrong: dict[str, list[float] | str] = {name: _why(contestant) for name, contestant in contestants.items()}
    right = {name: contestant.run for name, contestant in contestants.items() if not wrong[name]}
    return {**wrong, **interleave(right, seconds)}


def _why(contestant: Contestant) -> str:
    """What is wrong; an exception is wrong, too, and must not cost the others their times."""
    try:
        return contestant.why_wrong()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}"


def report(benchmark: BenchmarkFixture, found: list[float] | str, **info: Any) -> None:
    """Hand pytest-benchmark what was measured elsewhere, with case, mode and provider; a wrong result fails the test."""
    if isinstance(found, str):
        pytest.fail(f"{info['provider']} is wrong in {info['case']}, {info['mode']}: {found}")
    benchmark.group = f"{info['case']} {info['mode']}"
    benchmark.extra_info |= {"threads": THREADS, **info}
    clock = _replay(found)
    benchmark._timer = lambda: next(clock)
    benchmark.pedantic(lambda: None, rounds=len(found), iterations=1)


def _replay(seconds: list[float]) -> Iterator[float]:
    """A clock that shows these durations one after the other."""
    now = 0.0
    for duration in seconds:
        yield now
        now += duration
        yield now


def interleave(functions: Mapping[Name, Callable[[], object]], seconds: float) -> dict[Name, list[float]]:
    """Time all functions in turn, burst after burst, for `seconds` in all: name → seconds of each call.

    A machine's noise comes in stretches: what is measured in turn is slowed down together, so ratios hold. In bursts of
    some 20 ms, the first call not counted, because each function would otherwise find its neighbours' data in the cache:
    at B = 1, D = 64, H = 256 that takes 350 µs instead of 90. Calls longer than a burst bring their own data, and all count.
    """
    long = {name: _warm(f) > BURST for name, f in functions.items()}
    times: dict[Name, list[float]] = {name: [] for name in functions}
    names = list(functions)
    gc.collect()
    gc.disable()
    try:
        end, bursts = time.perf_counter() + (0 if _quick else seconds), 0
        while names and (time.perf_counter() < end or bursts < LEAST_BURSTS * len(names)):
            f, found = functions[names[0]], times[names[0]]
            if not long[names[0]]:
                f()
            last = start = time.perf_counter()
            while last - start < (0 if _quick and found else BURST):
                f()
                now = time.perf_counter()
                found.append(now - last)
                last = now
            names.append(names.pop(0))
            bursts += 1
    finally:
        gc.enable()
    return times


def _warm(f: Callable[[], object]) -> float:
    """Call f until it is warm; returns the seconds of the last call."""
    took = 0.0
    for _ in range(WARMUP):
        start = time.perf_counter()
        f()
        took = time.perf_counter() - start
        if took > 0.5:  # its own first half second has warmed everything
            break
    return took


def _best(f: Callable[[], object]) -> float:
    return min(interleave({"": f}, 0.15)[""])


# m, k, n of the products whose rates are tried: large ones, and those of the flows glf-cifar, wide and throughput.
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (256, 256, 256), (4096, 512, 512), (16384, 256, 256))


@cache
def matrix_rate() -> float:
    """Operations per second of torch's float32 matrix product: the best call of any of `PRODUCTS` in three seconds.

    Tried in turn, so that a stretch in which the machine is slow meets all of them and spoils none.
    """
    products = {shape: partial(torch.mm, *_operands(*shape)) for shape in PRODUCTS}
    times = interleave(products, 3.0)
    return max(2 * math.prod(shape) / min(times[shape]) for shape in PRODUCTS)


def _operands(m: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(m, k), torch.randn(n, k).T  # as a dense layer has them


@cache
def bandwidth(size: int) -> float:
    """Bytes per second of summing `size` bytes again and again, at its best: of the cache that they fit in, or of memory."""
    a = torch.randn(max(size, 1 << 16) // 4)
    return 4 * a.numel() / _best(a.sum)


@cache
def copy_bandwidth(size: int) -> float:
    """Bytes per second, read and written, of torch's copies of `size` / 2 bytes into as many others, at its best."""
    a = torch.randn(size // 8)
    b = torch.empty_like(a)
    return 8 * a.numel() / _best(lambda: b.copy_(a))


def yardstick(operations: int, size: int) -> float:
    """Seconds of the matrix products alone at torch's matrix rate, or of reading the bytes.

    No bound: kernels that use wider vectors than torch's library does need less.
    """
    return max(operations / matrix_rate(), size / bandwidth(size))
