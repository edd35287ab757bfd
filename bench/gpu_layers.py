"""Rows of the GPU benchmark for operations on layers: couplings of images, dense matrices, PLU layers, layers applied."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from bench import gpu_part as part
from bench.cases import COUPLING_MODES, COUPLINGS, CouplingCase
from bench.couplings import PROVIDERS, Coupling
from bench.factors import ASSEMBLED, Assembled, Factored, PluCase
from bench.gpu_part import OURS_AND_EAGER, SECONDS, Job, Missing, check_time, rehearsing, replays
from bench.linear import (
    APPLIED,
    BACKENDS,
    GRAPHED,
    Applied,
    AppliedCase,
    Linear,
    LinearCase,
    applied_names,
    why_missing,
)
from bench.results import Result, stats

__all__ = ["coupling_jobs", "layer_jobs", "linear_jobs", "operation"]

DIMS = ((32, 64, 8, 16, 4), (128, 192, 48, 96, 12, 24))  # those of the goals first


def operation(
    suite: str,
    case: Any,
    mode: str,
    name: str,
    make: Callable[[], Any],
    operations: int = 0,
    graph: bool = True,
    **about: int,
) -> Result:
    """One provider's calls of an operation on layers; beside them the kernels alone, where a graph can hold them."""
    first = make()
    work = partial(first.run, mode)
    if wrong := first.why_wrong(mode):
        raise AssertionError(wrong)
    if name.endswith(GRAPHED):
        work = part.clock.Graph(work).replay
    check_time()
    calls, host = part.clock.call_times(work, SECONDS / 2)
    size = case.bytes(mode)
    yardstick = max(
        operations / part.clock.matrix_rate("highest") if operations else 0.0, size / part.clock.bandwidth()
    )
    info: dict[str, Any] = {"bytes": size, "operations": operations, "yardstick_s": yardstick, "host_s": host, **about}
    kernels = statistics.median(calls)
    if graph:
        # Over copies that are together larger than three L2 caches, or many.
        copies = [work, *(partial(make().run, mode) for _ in range(1, part.clock.rotations(size)))]
        info |= replays(*copies)
        kernels = info.get("graph_cold", {"median": kernels})["median"]
    info |= {"share_of_copy": size / kernels / part.clock.bandwidth(), "gbytes_per_s": size / kernels / 1e9}
    return Result(suite, case.name, mode, name, stats(calls), info)


def coupling_jobs() -> Iterator[Job]:
    """The elementwise coupling of images, and of a size that fills a GPU; the compiler last: it takes long."""
    large = [CouplingCase((4096, 24, 16, 16), order) for order in ("contiguous", "channels-last")]
    cases = [CouplingCase((2, 4, 4, 4), "contiguous")] if rehearsing() else [*large, *COUPLINGS]
    for name in PROVIDERS:
        for case in cases:
            for mode in COUPLING_MODES:
                make = partial(Coupling, name, case, part.clock.DEVICE)
                yield "coupling", case.name, mode, name, partial(operation, "coupling", case, mode, name, make)


def linear_jobs() -> Iterator[Job]:
    """log|det| and inverse of dense matrices: ours, each library under torch.linalg, CuPy; the goals' sizes first."""
    sizes = [(3, 5), (3, 6)] if rehearsing() else [(n, d) for dims in DIMS for n in (16384, 1024, 32, 8) for d in dims]
    for case in (LinearCase(count, dim) for count, dim in sizes):
        for name in ("glf_fast", *BACKENDS, "CuPy"):
            yield dense(case, "forward", name)


def dense(case: LinearCase, mode: str, name: str) -> Job:
    """`torch.linalg, graphed` is its default library, captured: some sizes it may refuse, which is why it comes last."""

    def measure() -> Result:
        if reason := why_missing(name, part.clock.DEVICE, mode):
            raise Missing(reason)
        make = partial(Linear, name.removesuffix(GRAPHED), case, part.clock.DEVICE)
        ours, about = name == "glf_fast", {"batch": case.count, "dim": case.dim}
        return operation("linear", case, mode, name, make, case.operations(mode), ours, **about)

    return "linear", case.name, mode, name, measure


def layer_jobs() -> Iterator[Job]:
    """What flows do with their layers beside the whole-flow kernels, and backwards."""
    small = rehearsing()
    for factors in [PluCase(2, 4)] if small else ASSEMBLED:
        for mode in ("forward", "train"):
            for name in OURS_AND_EAGER:
                make: Callable[[], Any] = partial(Assembled, name, factors, part.clock.DEVICE)
                work = partial(operation, "assemble", factors, mode, name, make, factors.operations(mode))
                yield "assemble", factors.name, mode, name, work
    cases = [LinearCase(n, d) for n, d in ([(2, 4)] if small else [(1024, 32), (8, 64), (1024, 64), (1024, 16)])]
    for case in cases:
        for name in ("glf_fast", "torch.linalg"):
            yield dense(case, "train", name)
    for case in cases:
        for name in ("glf_fast", "torch.linalg"):
            make = partial(Factored, name, case, part.clock.DEVICE)
            work = partial(
                operation, "lu", case, "forward", name, make, case.operations("forward") // 3, name == "glf_fast"
            )
            yield "lu", case.name, "forward", name, work
    for layer in [AppliedCase((2, 4))] if small else APPLIED:
        for mode in COUPLING_MODES:
            for name in applied_names(layer):
                make = partial(Applied, name, layer, part.clock.DEVICE)
                work = partial(operation, "apply", layer, mode, name, make, layer.operations(mode))
                yield "apply", layer.name, mode, name, work
    for case in cases:
        yield dense(case, "forward", f"torch.linalg{GRAPHED}")
