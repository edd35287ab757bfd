"""Times on a GPU: what the kernels take, by replaying a captured graph, and what a call takes, host included."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["Graph", "bandwidth", "call_times", "launches", "matrix_rate", "peak_memory"]

Work = Callable[[], object]
WARMUP = 3


class Graph:
    """A pass captured as a CUDA graph: its replays have no host in them."""

    def __init__(self, work: Work) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = work()

    def times(self, seconds: float, *, cold: bool) -> list[float]:
        """Seconds of each replay. `cold`: three times the L2 cache is written between two, so that weights come from memory.

        Writing also keeps the GPU busy while the host enqueues the replay: the time between the events is the graph's alone.
        """
        waste = torch.empty(3 * _l2() // 4, device="cuda")
        pairs: list[list[torch.cuda.Event]] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(pairs) < 10:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if cold:
                waste.zero_()
            else:
                waste[: 1 << 20].zero_()
                self.graph.replay()  # warms the caches again
            pair[0].record()
            self.graph.replay()
            pair[1].record()
            pairs.append(pair)
            if len(pairs) % 50 == 0:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def call_times(work: Work, seconds: float) -> tuple[list[float], float]:
    """Seconds of calls in a row, as a program makes them (each the mean of 20), and the host's share of one."""
    for _ in range(WARMUP):
        work()
    torch.cuda.synchronize()
    times: list[float] = []
    host: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        for _ in range(20):
            work()
        host.append((time.perf_counter() - start) / 20)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 20)
    return times, min(host)


def peak_memory(work: Work) -> int:
    """Bytes that a pass allocates above what was there before, at its peak."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(work: Work) -> int:
    """Kernels, copies and fills that a pass puts on the GPU."""
    work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(1 for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def _l2() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def _best(work: Work) -> float:
    return min(Graph(work).times(0.3, cold=False))


@cache
def matrix_rate(dtype: torch.dtype) -> float:
    """Operations per second of a matrix product of 8192³ at its best; float32 as the matmul precision says."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    out: Tensor = torch.empty_like(a)
    return 2 * 8192**3 / _best(lambda: torch.mm(a, b, out=out))


@cache
def bandwidth() -> float:
    """Bytes per second, read and written, of a copy of one gigabyte at its best."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / _best(lambda: b.copy_(a))
