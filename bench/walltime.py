"""Wall times on a processor: providers interleaved in one run, and the machine's own rates beside them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from functools import cache

import torch

__all__ = ["bandwidth", "floor", "interleave", "matrix_rate"]

WARMUP = 3
BURST = 0.02  # seconds
LEAST_BURSTS = 3


def interleave(functions: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Time all functions in turn, burst after burst, for `seconds` in all: name → seconds of each call.

    A machine's noise comes in stretches: what is measured in turn is slowed down together, so ratios hold. In bursts of
    some 20 ms, the first call not counted, because each function would otherwise find its neighbours' data in the cache:
    at B = 1, D = 64, H = 256 that takes 350 µs instead of 90.
    """
    for f in functions.values():
        for _ in range(WARMUP):
            f()
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    gc.collect()
    gc.disable()
    try:
        end, bursts = time.perf_counter() + seconds, 0
        while time.perf_counter() < end or bursts < LEAST_BURSTS * len(names):
            f, found = functions[names[0]], times[names[0]]
            f()
            last = start = time.perf_counter()
            while last - start < BURST:
                f()
                now = time.perf_counter()
                found.append(now - last)
                last = now
            names.append(names.pop(0))
            bursts += 1
    finally:
        gc.enable()
    return times


def _best(f: Callable[[], object]) -> float:
    return min(interleave({"": f}, 0.3)[""])


@cache
def matrix_rate(threads: int) -> float:
    """Operations per second of torch's float32 matrix product, 1024³, at its best."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out = torch.empty(1024, 1024)
    return 2 * 1024**3 / _best(lambda: torch.mm(a, b, out=out))


@cache
def bandwidth(size: int, threads: int) -> float:
    """Bytes per second of summing `size` bytes again and again, at its best: of the cache that they fit in, or of memory."""
    a = torch.randn(max(size, 1 << 16) // 4)
    return 4 * a.numel() / _best(a.sum)


def floor(operations: int, size: int, threads: int) -> float:
    """Seconds of the matrix products alone at torch's own rate, or of reading the bytes: what an implementation built on
    torch's products cannot go below. Kernels that use wider vectors than its library does can.
    """
    return max(operations / matrix_rate(threads), size / bandwidth(size, threads))
