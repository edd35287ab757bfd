"""The form of every benchmark, whatever drives it: providers race in one case and mode, on the clock of a device.

A race is of several providers, because a machine's noise comes in stretches: each one's job is checked, then all are timed in
turn, and their ratios hold.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from bench.results import Key, Result, stats

__all__ = [
    "GRAPHED",
    "SEED",
    "Bursts",
    "Calls",
    "Case",
    "Clock",
    "GraphClock",
    "Job",
    "Missing",
    "Provider",
    "Race",
    "Timed",
    "graph_clock",
    "graphed",
    "in_turn",
]

Work = Callable[[], object]
SEED = 2  # of the noise in the pass that is checked
WARMUP = 3
GRAPHED = ", graphed"  # after a provider's name: its call is captured once as a CUDA graph, and replayed


class Case(Protocol):
    """A size of a problem, by name."""

    @property
    def name(self) -> str:
        """The name in results."""

    @property
    def sizes(self) -> dict[str, Any]:
        """Sizes that results repeat, such as the batch."""

    def operations(self, mode: str) -> int:
        """Floating-point operations of a pass, or 0."""

    def bytes(self, mode: str) -> int:
        """Least traffic of a pass to memory, or 0 where nothing is known."""


class Calls(NamedTuple):
    """Seconds of calls, and of the host's least share of one where that is known."""

    seconds: list[float]
    host: float | None = None


class Clock(Protocol):
    """A clock that times passes on a device: the module `processor_clock`, or a `GraphClock`."""

    DEVICE: str
    GPU: bool  # it is a `GraphClock`

    def call_times(self, works: Mapping[str, Work | Bursts], seconds: float) -> Mapping[str, Calls | Exception]:
        """Times of calls, the works in turn, `seconds` for each; or what a work raised."""

    def matrix_rate(self, precision: str) -> float:
        """Operations per second of torch's matrix products in a matmul precision."""

    def bandwidth(self, size: int) -> float:
        """Bytes per second of reading `size` bytes again and again."""

    def copy_bandwidth(self, size: int) -> float:
        """Bytes per second, read and written, of a copy that moves `size` bytes."""

    def peak_memory(self, work: Work) -> int:
        """Bytes that a pass holds beyond what was there, at its peak."""

    def alive(self) -> bool:
        """Whether the device still answers."""


class GraphClock(Clock, Protocol):
    """The clock of a GPU, whose kernels can be timed without the host: the modules `gpu_clock` and `rehearsal`."""

    def name(self) -> str:
        """The GPU's name."""

    def kernel_times(self, works: Sequence[Work]) -> Mapping[str, list[float]]:
        """Seconds of a pass's kernels alone, from one graph over passes: "cold", and of one pass "warm" caches, too."""

    def captured(self, work: Work) -> Work:
        """The pass as a graph that was captured once, and is replayed."""

    def rotations(self, size: int) -> int:
        """How many copies of `size` bytes do not fit in the caches together."""

    def launches(self, work: Work) -> int:
        """Kernels, copies and fills of a pass."""


def graph_clock(clock: Clock) -> GraphClock:
    """A clock whose `GPU` is true, as what it is."""
    assert clock.GPU
    return cast(GraphClock, clock)


class Timed(NamedTuple):
    """A result, and the seconds that it is made of."""

    result: Result
    seconds: list[float]


class Bursts(Protocol):
    """Passes that are timed where they run, in another process."""

    def burst(self, seconds: float) -> list[float]:
        """Call for so long, at least once; returns the seconds of each call."""


class Missing(Exception):
    """A provider cannot be measured here; the message says why."""


@dataclass
class Job:
    """A provider's passes over a case.

    Attributes:
        call: one pass over the inputs; returns what is checked. None where there is nothing to time.
        bursts: the same pass in another process, where it is timed.
        check: says what is wrong with a pass's result, or "".
        inputs: what a program brings to each call.
        info: what results say beside the case's sizes and the times.
        seconds: times that were taken elsewhere, where there is no call.
        rate: a unit that is said per second, and its number in a pass.
        alone: its kernels are timed alone, too.
        again: another job of the same, over memory of its own, where kernels should find the caches cold.
        in_graph: its memory belongs to graphs.
    """

    call: Callable[..., Any] | None
    check: Callable[[Any], str]
    inputs: tuple[Tensor | None, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    seconds: Sequence[float] = (0.0,)
    rate: tuple[str, int] | None = None
    alone: bool = False
    again: Callable[[], Job] | None = None
    in_graph: bool = False
    bursts: Bursts | None = None

    @property
    def work(self) -> Work | Bursts | None:
        """What a clock times, if anything."""
        return self.bursts or (self.run if self.call else None)

    def run(self) -> Any:
        """One pass."""
        assert self.call
        return self.call(*self.inputs)

    def why_wrong(self) -> str:
        """Say what is wrong with a pass's result, or ""."""
        torch.manual_seed(SEED)
        return self.check(self.run())


@dataclass(frozen=True)
class Provider:
    """An implementation that can be measured.

    Attributes:
        job: makes its passes over a case in a mode, on a clock's device.
        why_not: says why it cannot, or "".
    """

    name: str
    job: Callable[[Any, str, Clock], Job]
    why_not: Callable[[Any, str, str], str] = lambda case, mode, device: ""


def graphed(provider: Provider) -> Provider:
    """The same with its whole call as a graph, used as a training or sampling loop would: inputs are copied in, then replay.

    What a call returns, and the gradients, lie in the graph's memory: the next replay overwrites them.
    """

    def job(case: Case, mode: str, clock: Clock) -> Job:
        made = provider.job(case, mode, clock)
        assert made.call
        held = tuple(None if t is None else t.clone() for t in made.inputs)
        replay = graph_clock(clock).captured(lambda: made.call(*held))  # type: ignore[misc]

        def call(*inputs: Tensor | None) -> object:
            for mine, theirs in zip(held, inputs, strict=True):
                if mine is not None and theirs is not None:
                    mine.copy_(theirs)
            return replay()

        return replace(made, call=call, alone=False, in_graph=True)

    return Provider(f"{provider.name}{GRAPHED}", job, provider.why_not)


@dataclass(frozen=True)
class Race:
    """Providers that run in turn: `seconds` of calls for each, in one of torch's matmul precisions.

    `label` is the mode's name in results, where that is not the mode.
    """

    suite: str
    case: Case
    mode: str
    providers: tuple[Provider, ...]
    seconds: float
    precision: str = "highest"
    label: str = ""

    @property
    def key(self) -> Key:
        """Suite, case and mode in results."""
        return self.suite, self.case.name, self.label or self.mode

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the providers."""
        return tuple(provider.name for provider in self.providers)

    def only(self, names: Iterable[str]) -> Race:
        """The same for these alone."""
        return replace(self, providers=tuple(p for p in self.providers if p.name in {*names}))

    def enter(self, name: str, clock: Clock) -> Job:
        """One provider's job, whose results are right.

        Raises:
            Missing: it cannot be measured here.
            AssertionError: what is wrong with its results.
        """
        torch.set_float32_matmul_precision(self.precision)
        provider = self.providers[self.names.index(name)]
        if reason := provider.why_not(self.case, self.mode, clock.DEVICE):
            raise Missing(reason)
        job = provider.job(self.case, self.mode, clock)
        if job.call:
            # What is captured at the second call is checked at the fourth.
            for _ in range(WARMUP if job.in_graph else 0):
                job.run()
            if wrong := job.why_wrong():
                raise AssertionError(wrong)
            if clock.GPU and not job.in_graph and "peak_bytes" not in job.info:
                job.info["peak_bytes"] = clock.peak_memory(job.run)
        if job.work:
            job.info |= self._yardstick(clock)
        return job

    def _yardstick(self, clock: Clock) -> dict[str, Any]:
        """The products at the device's matrix rate, or the bytes at its bandwidth; without products, a copy of the bytes.

        It is no bound: kernels that use wider vectors than torch's library do need less.
        """
        operations, size = self.case.operations(self.mode), self.case.bytes(self.mode)
        if not size:
            return {}
        if not operations:
            return {"bytes": size, "yardstick_s": size / clock.copy_bandwidth(size)}
        rate = clock.matrix_rate(self.precision)
        seconds = max(operations / rate, size / clock.bandwidth(size))
        return {"operations": operations, "bytes": size, "yardstick_s": seconds, "matrix_gflops": rate / 1e9}

    def timed(self, jobs: Mapping[str, Job], clock: Clock) -> dict[str, Timed | Exception]:
        """Results of those that entered: calls in turn, then kernels alone; or what a call raised.

        Who got no turn before the device was lost has neither.
        """
        torch.set_float32_matmul_precision(self.precision)
        calls = clock.call_times({name: work for name, job in jobs.items() if (work := job.work)}, self.seconds)
        found: dict[str, Timed | Exception] = {}
        for name, job in jobs.items():
            taken = calls.get(name) if job.work else Calls(list(job.seconds))
            if isinstance(taken, Exception):
                found[name] = taken
            elif taken is not None:
                found[name] = Timed(self._result(name, job, taken, clock), taken.seconds)
        return found

    def _result(self, name: str, job: Job, taken: Calls, clock: Clock) -> Result:
        info = ({} if clock.GPU else {"threads": torch.get_num_threads()}) | self.case.sizes | job.info
        call = statistics.median(taken.seconds)
        if taken.host is not None:
            info["host_s"] = taken.host
        if job.alone and clock.GPU:
            info |= self._kernels(job, graph_clock(clock))
        kernels = info["graph_cold"]["median"] if "graph_cold" in info else call
        if "operations" in info:
            info["gflops"] = info["operations"] / call / 1e9
            info["share_of_matrix_rate"] = info["operations"] / kernels / info["matrix_gflops"] / 1e9
        elif "bytes" in info:
            info["gbytes_per_s"] = info["bytes"] / kernels / 1e9
            info["share_of_copy"] = info["yardstick_s"] / kernels
        if job.rate:
            info[f"{job.rate[0]}_per_s"] = job.rate[1] / call
        return Result(*self.key, name, stats(taken.seconds), info)

    def _kernels(self, job: Job, clock: GraphClock) -> dict[str, Any]:
        """Times of the kernels alone."""
        size = self.case.bytes(self.mode)
        try:
            copies = [job.again().run for _ in range(1, clock.rotations(size))] if job.again else []
            times = clock.kernel_times([job.run, *copies])
            return {f"graph_{caches}": stats(seconds) for caches, seconds in times.items()}
        except RuntimeError as error:  # what cannot be captured has still been called
            traceback.print_exc()
            return {"graph_failed": str(error)[:300]}


def in_turn(
    names: Sequence[Any], turn: Callable[[Any], None], going: Callable[[int], bool], alive: Callable[[], bool]
) -> dict[Any, Exception]:
    """Rounds of turns, one a name, while `going(rounds)`; returns what turns raised.

    Who raised has no more turns; the others go on, unless the device is lost.
    """
    failed: dict[Any, Exception] = {}
    rounds = 0
    while len(failed) < len(names) and going(rounds):
        for name in names:
            if name not in failed:
                try:
                    turn(name)
                except Exception as error:  # one work's failure must not cost the others
                    failed[name] = error.with_traceback(None)  # which would keep all works alive
                    if not alive():
                        return failed
        rounds += 1
    return failed
