"""The clock of GPUs: what the kernels take, by replaying a captured graph, and what a call takes, host included.

`bench.rehearsal` offers the same names on a processor.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from bench.race import Calls, in_turn

__all__ = [
    "DEVICE",
    "GPU",
    "alive",
    "bandwidth",
    "call_times",
    "captured",
    "copy_bandwidth",
    "kernel_times",
    "launches",
    "matrix_rate",
    "name",
    "peak_memory",
    "rotations",
]

Work = Callable[[], object]

DEVICE = "cuda"
GPU = True
SECONDS = 0.12  # of one graph's cold replays
WARMUP = 3
COLD = 8  # times the L2 cache is what is read between two replays
BUSY = 8  # times that is read: about a millisecond, in which the host enqueues a graph of a thousand launches
REPLAYS = 10  # between two events, where the caches may be warm
AHEAD = 0.05  # seconds of work that the host enqueues before it waits and looks at the clock
READ = 2e-4  # seconds of reading the waste once: 400 MB on an H200
COPIES = 64
LEAST = 5  # measurements of each work


def name() -> str:
    """The GPU's name."""
    return torch.cuda.get_device_name()


class Graph:
    """Passes captured as one CUDA graph: its replays have no host in them."""

    def __init__(self, *works: Work) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                works[0]()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = [work() for work in works]  # kept, so that each has memory of its own

    def replay(self) -> None:
        """All passes once."""
        self.graph.replay()

    def times(self, seconds: float, *, cold: bool) -> list[float]:
        """Seconds of a pass, one number a measurement.

        `cold`: several times the L2 cache is read before each, so that weights and inputs come from memory. Reading, not
        writing: what was written would go back to memory while the pass runs. It also keeps the GPU busy while the host
        enqueues the replay, so that the time between the events is the graph's alone.
        """
        waste = _waste()
        once = _seconds(self.graph.replay, warmup=0)
        replays = 1 if cold else max(1, min(REPLAYS, int(AHEAD / once)))
        pairs: list[list[torch.cuda.Event]] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(pairs) < LEAST:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            for _ in range(BUSY):
                waste.sum()
            if not cold:
                self.graph.replay()
            pair[0].record()
            for _ in range(replays):
                self.graph.replay()
            pair[1].record()
            pairs.append(pair)
            if len(pairs) % max(1, int(AHEAD / (replays * once + BUSY * READ))) == 0:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 / replays / len(self.results) for a, b in pairs]


def kernel_times(works: Sequence[Work]) -> dict[str, list[float]]:
    """Seconds of a pass's kernels alone, from one graph over all passes: "cold", and of one pass "warm" caches, too."""
    graph = Graph(*works)
    found = {"cold": graph.times(SECONDS, cold=True)}
    return found if len(works) > 1 else found | {"warm": graph.times(SECONDS / 2, cold=False)}


def captured(work: Work) -> Work:
    """The pass as a graph, which returns what lies in its memory."""
    graph = Graph(work)

    def replay() -> object:
        graph.replay()
        return graph.results[0]

    return replay


def rotations(size: int) -> int:
    """How many copies of `size` bytes are more than three times the L2 cache, so that passes over them in turn find it cold.

    Of small ones no more than `COPIES`: thousands of launches take longer to capture than is left. A graph over so few is
    replayed cold, behind reads of several times the cache.
    """
    return min(COPIES, math.ceil(3 * _l2() / size))


def call_times(works: Mapping[str, Work], seconds: float) -> dict[str, Calls | Exception]:
    """Times of calls as a program makes them, the works in turn, `seconds` for each; or what a work raised.

    When the GPU is lost the others have the times that they had until then, or none.

    In bursts of up to 20 calls and 50 ms, so that a change of the clocks meets all works, and ratios hold. The first call of
    a burst finds the caches of the work before it, and does not count.
    """
    bursts: dict[str, int] = {}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in works}
    end = 0.0

    def turn(name: str) -> None:
        if name in bursts:
            _burst(works[name], bursts[name], *times[name])
        else:  # the first round only warms
            bursts[name] = max(1, min(20, int(0.05 / _seconds(works[name]))))

    def going(rounds: int) -> bool:
        nonlocal end
        if rounds == 1:
            end = time.perf_counter() + seconds * len(works)
        return rounds <= LEAST or time.perf_counter() < end

    gc.disable()
    try:
        failed: dict[str, Calls | Exception] = dict(in_turn(list(works), turn, going, alive))
    finally:
        gc.enable()
    right = {name: Calls(calls, min(host)) for name, (calls, host) in times.items() if name not in failed and calls}
    return failed | right


def _seconds(work: Work, warmup: int = WARMUP) -> float:
    """Seconds of a call, roughly, after some that warm it."""
    for _ in range(warmup):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _burst(work: Work, calls: int, times: list[float], host: list[float]) -> None:
    """Add the mean times of calls in a row, and of the host in them."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    enqueued = time.perf_counter()
    torch.cuda.synchronize()
    times.append((time.perf_counter() - start) / calls)
    host.append((enqueued - start) / calls)


def peak_memory(work: Work) -> int:
    """Bytes that a pass allocates above what was there before, at its peak."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def alive() -> bool:
    """Whether the GPU still answers this process: after an illegal access nothing does, until the process ends."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def launches(work: Work) -> int:
    """Kernels, copies and fills that a pass puts on the GPU; 0 where the profiler cannot see them."""
    work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(1 for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def _l2() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


@cache
def _waste() -> Tensor:
    return torch.zeros(COLD * _l2() // 4, device=DEVICE)


def _best(work: Work) -> float:
    return min(Graph(work).times(0.2, cold=False))


@cache
def matrix_rate(precision: str) -> float:
    """Operations per second of a matrix product of 8192³ at its best, in float32 as this matmul precision says.

    "medium" means bfloat16 operands to our kernels, while torch then still takes tf32: its rate is that of bfloat16.
    """
    dtype = torch.bfloat16 if precision == "medium" else torch.float32
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in range(2))
    out: Tensor = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return 2 * 8192**3 / _best(lambda: torch.mm(a, b, out=out))
    finally:
        torch.set_float32_matmul_precision(before)


def bandwidth(size: int) -> float:
    """Bytes per second of a copy, whatever the size."""
    return _copy()


copy_bandwidth = bandwidth


@cache
def _copy() -> float:
    """Bytes per second, read and written, of a copy of one gigabyte at its best."""
    a = torch.randn(1 << 28, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / _best(lambda: b.copy_(a))
