"""The clock of processors: wall times of bursts in turn, and the machine's own rates beside them."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import torch

from bench.race import Bursts, Calls, in_turn

__all__ = [
    "DEVICE",
    "GPU",
    "THREADS",
    "alive",
    "bandwidth",
    "call_times",
    "copy_bandwidth",
    "matrix_rate",
    "peak_memory",
    "quick",
]

Work = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)
DEVICE = "cpu"
GPU = False
THREADS = int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads()
WARMUP = 3
BURST = 0.02  # seconds
LEAST = 3  # bursts of each work

_quick = False


def quick() -> None:
    """From now on, measure as little as possible: to see that everything runs (`pytest bench --quick`)."""
    global _quick
    _quick = True


def call_times(works: Mapping[Name, Work | Bursts], seconds: float) -> dict[Name, Calls | Exception]:
    """Time all works in turn, burst after burst, `seconds` for each: seconds of each call, or what a work raised.

    A machine's noise comes in stretches: what is measured in turn is slowed down together, so ratios hold. In bursts of
    some 20 ms, the first call not counted, because each work would otherwise find its neighbours' data in the cache:
    at B = 1, D = 64, H = 256 that takes 350 µs instead of 90. Calls longer than a burst bring their own data, and all count.
    """
    long: dict[Name, bool] = {}
    times: dict[Name, list[float]] = {name: [] for name in works}
    end = 0.0

    def turn(name: Name) -> None:
        work = works[name]
        if not callable(work):
            burst = work.burst(0 if _quick else BURST)
            times[name] += burst[len(burst) > 1 :]
        elif name in long:
            _burst(work, long[name], times[name])
        else:  # the first round only warms
            long[name] = _warm(work) > BURST

    def going(rounds: int) -> bool:
        nonlocal end
        if rounds == 1:
            gc.collect()
            gc.disable()
            end = time.perf_counter() + (0 if _quick else seconds * len(works))
        return rounds <= LEAST or time.perf_counter() < end

    try:
        failed: dict[Name, Calls | Exception] = dict(in_turn(list(works), turn, going, alive))
    finally:
        gc.enable()
    return failed | {name: Calls(found) for name, found in times.items() if name not in failed}


def _burst(work: Work, long: bool, times: list[float]) -> None:
    """Add the seconds of each call."""
    if not long:
        work()
    last = start = time.perf_counter()
    while last - start < (0 if _quick and times else BURST):
        work()
        now = time.perf_counter()
        times.append(now - last)
        last = now


def _warm(work: Work) -> float:
    """Call it until it is warm; returns the seconds of the last call."""
    took = 0.0
    for _ in range(WARMUP):
        start = time.perf_counter()
        work()
        took = time.perf_counter() - start
        if took > 0.5:  # its own first half second has warmed everything
            break
    return took


def _best(works: Mapping[Name, Work], seconds: float) -> dict[Name, float]:
    """Seconds of each work's fastest call."""
    found: dict[Name, float] = {}
    for name, calls in call_times(works, seconds).items():
        if isinstance(calls, Exception):
            raise calls
        found[name] = min(calls.seconds)
    return found


# m, k, n of the products whose rates are tried: large ones, and those of the flows glf-cifar, wide and throughput.
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (256, 256, 256), (4096, 512, 512), (16384, 256, 256))


@cache
def matrix_rate(precision: str = "highest") -> float:
    """Operations per second of torch's float32 matrix product: the best call of any of `PRODUCTS` in three seconds.

    Tried in turn, so that a stretch in which the machine is slow meets all of them and spoils none.
    """
    products = {shape: partial(torch.mm, *_operands(*shape)) for shape in (PRODUCTS[:1] if _quick else PRODUCTS)}
    return max(2 * math.prod(shape) / best for shape, best in _best(products, 3.0 / len(PRODUCTS)).items())


def _operands(m: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(m, k), torch.randn(n, k).T  # as a dense layer has them


@cache
def bandwidth(size: int) -> float:
    """Bytes per second of summing `size` bytes again and again, at its best: of the cache that they fit in, or of memory."""
    a = torch.randn(max(size, 1 << 16) // 4)
    return 4 * a.numel() / _best({"": a.sum}, 0.15)[""]


@cache
def copy_bandwidth(size: int) -> float:
    """Bytes per second, read and written, of torch's copies of `size` / 2 bytes into as many others, at its best."""
    a = torch.randn(size // 8)
    b = torch.empty_like(a)
    return 8 * a.numel() / _best({"": lambda: b.copy_(a)}, 0.15)[""]


def peak_memory(work: Work) -> int:
    """Bytes of the resident set that a pass adds to what the process held before, at its peak.

    Linux only: the kernel's high-water mark, which counts every allocation of every library. Blocks that were freed must be
    out of the set by then, or the pass would use them unseen: see `bench.memory.ENVIRONMENT`.
    """
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts again from here
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field)
    )
    return 1024 * int(line.split()[1])


def alive() -> bool:
    """A processor always answers."""
    return True
