"""Races of operations on layers on a GPU: couplings of images, dense matrices, PLU layers, layers applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench import gpu_races
from bench.baselines import GRAPHED
from bench.cases import COUPLING_MODES, CouplingCase
from bench.couplings import Coupling
from bench.factors import ASSEMBLED, Assembled, PluCase
from bench.gpu_races import OURS_AND_EAGER, Entry, Missing, Race, rehearsing
from bench.linear import APPLIED, Applied, AppliedCase, Linear, LinearCase, applied_names, why_missing

__all__ = ["DENSE", "LARGE", "coupling_races", "layer_races", "linear_races"]

# Images that fill a GPU, in both orders of memory.
LARGE = [CouplingCase((4096, 24, 16, 16), order) for order in ("contiguous", "channels-last")]
# Who inverts dense matrices; torch.linalg's default library may refuse to be captured.
DENSE = tuple(f"{name}{how}" for name in ("glf_fast", "torch.linalg") for how in ("", GRAPHED))


def _operation(
    case: Any,
    mode: str,
    make: Callable[[str], Any],
    name: str,
    *,
    operations: int = 0,
    alone: bool = True,
    **about: int,
) -> Entry:
    """One provider's calls of an operation on layers; beside them the kernels `alone`, where a graph can hold them."""
    clock = gpu_races.clock
    torch.set_float32_matmul_precision("highest")
    graphed, plain = name.endswith(GRAPHED), name.removesuffix(GRAPHED)
    first = make(plain)
    if graphed:
        graph = clock.Graph(partial(first.run, mode))

        def replay(mode: str) -> Any:
            graph.replay()
            return graph.results[0]

        first.run = replay  # what is checked is what is timed
    if wrong := first.why_wrong(mode):
        raise AssertionError(wrong)
    work = partial(first.run, mode)
    size, bandwidth = case.bytes(mode), clock.bandwidth()
    floor = max(operations / clock.matrix_rate("highest") if operations else 0.0, size / bandwidth)
    info: dict[str, Any] = {"bytes": size, "operations": operations, "yardstick_s": floor, **about}

    def copies() -> list[Callable[[], object]]:
        """Together larger than three L2 caches, or many."""
        return [work, *(partial(make(plain).run, mode) for _ in range(1, clock.rotations(size)))]

    def conclude(call: float, kernels: float) -> dict[str, float]:
        return {"share_of_copy": size / kernels / bandwidth, "gbytes_per_s": size / kernels / 1e9}

    return Entry(work, info, copies if alone and not graphed else None, conclude)


def coupling_races(cases: Sequence[CouplingCase], names: tuple[str, ...] = OURS_AND_EAGER) -> Iterator[Race]:
    """The elementwise coupling of images."""
    for case in [CouplingCase((2, 4, 4, 4), case.order) for case in cases[:1]] if rehearsing() else cases:
        for mode in COUPLING_MODES:
            make = partial(Coupling, case=case, device=gpu_races.clock.DEVICE)
            yield Race("coupling", case.name, mode, names, partial(_operation, case, mode, make))


def linear_races(counts: Sequence[int], dims: Sequence[int], names: tuple[str, ...] = DENSE) -> Iterator[Race]:
    """log|det| and inverse of batches of dense matrices."""
    sizes = [(3, 5), (3, 6)] if rehearsing() else [(n, d) for n in counts for d in dims]
    for case in (LinearCase(count, dim) for count, dim in sizes):
        yield dense(case, "forward", names)


def dense(case: LinearCase, mode: str, names: tuple[str, ...]) -> Race:
    """`names` are those of bench.linear, or with GRAPHED behind."""

    def enter(name: str) -> Entry:
        device = gpu_races.clock.DEVICE
        if reason := why_missing(name.removesuffix(GRAPHED), device, mode):
            raise Missing(reason)
        make = partial(Linear, case=case, device=device)
        ours, about = name == "glf_fast", {"batch": case.count, "dim": case.dim}
        return _operation(case, mode, make, name, operations=case.operations(mode), alone=ours, **about)

    return Race("linear", case.name, mode, names, enter)


def layer_races() -> Iterator[Race]:
    """What flows do with their layers beside the whole-flow kernels, and backwards."""
    small, device = rehearsing(), gpu_races.clock.DEVICE
    for factors in [PluCase(2, 4)] if small else ASSEMBLED:
        for mode in ("forward", "train"):
            make: Callable[[str], Any] = partial(Assembled, case=factors, device=device)
            enter = partial(_operation, factors, mode, make, operations=factors.operations(mode))
            yield Race("assemble", factors.name, mode, OURS_AND_EAGER, enter)
    cases = [LinearCase(n, d) for n, d in ([(2, 4)] if small else [(1024, 32), (8, 64), (1024, 64), (1024, 16)])]
    for case in cases:
        yield dense(case, "train", ("glf_fast", "torch.linalg"))
    for layer in [AppliedCase((2, 4))] if small else APPLIED:
        for mode in COUPLING_MODES:
            make = partial(Applied, case=layer, device=device)
            enter = partial(_operation, layer, mode, make, operations=layer.operations(mode))
            yield Race("apply", layer.name, mode, applied_names(layer), enter)
