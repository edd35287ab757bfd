"""The goals of the design, on processors and on GPUs, where they are judged twice: in calls, and in graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bench import on_gpu, on_processor, splines
from bench.cases import SPLINES
from bench.judge import Flat, Goal, activations, kernels, peaks, table
from bench.libraries import KINDS, LIBRARIES
from bench.on_gpu import BATCHES, FLOW_MODES, NAMED
from bench.race import GRAPHED
from bench.results import Key, Results
from bench.tables import OURS

__all__ = ["GPU", "PROCESSOR", "gpu_goals", "processor_goals"]

BEST = ("compile", "reduce-overhead", f"eager{GRAPHED}")


def _of_flow(case: str, mode: str) -> tuple[Key]:
    return (("flow", case, mode),)


SPLINE = tuple(("spline", case.name, "train") for case in SPLINES)

PROCESSOR: tuple[Goal, ...] = (
    Goal("glf-cifar, train: the best library", 1.7, _of_flow("glf-cifar", "train"), (*LIBRARIES,)),
    Goal("glf-cifar, train: torch.compile", 1.7, _of_flow("glf-cifar", "train"), ("compile",)),
    *(
        Goal(f"{case}, train: {who}", least, _of_flow(case, "train"), against)
        for case in ("glf-mnist", "sbi")
        for who, least, against in (("the best library", 4.0, (*LIBRARIES,)), ("torch.compile", 2.5, ("compile",)))
    ),
    *(
        Goal(f"D 64, H 256, K 8, B = {batch}, {mode}: eager", least, _of_flow(f"small-batch-{batch}", mode), ("eager",))
        for batch, least in ((1, 10.0), (16, 5.0), (64, 3.0))
        for mode in ("log_prob", "sample")
    ),
    Goal("splines alone, train: the best library", 8.0, SPLINE, (*splines.LIBRARIES,)),
    Goal("splines alone, train: torch.compile", 3.0, SPLINE, ("compile",)),
    *(
        Goal(f"{case}, {mode}: {who}", least, _of_flow(case, mode), against)
        for case, modes, libraries in (
            ("splines", ("train", "log_prob", "sample"), 6.0),
            ("sbi-splines", ("train",), 8.0),
        )
        for mode in modes
        for who, least, against in (
            ("the best library", libraries, ("nflows", "normflows", "zuko")),
            ("flowjax", 2.0, ("flowjax",)),
        )
    ),
    *(
        Goal(f"{case}, {mode}: {library}", least, _of_flow(case, mode), (library,))
        for case, mode, library, least in (
            ("sbi-maf", "train", "nflows", 6.0),
            ("sbi-maf-10000", "log_prob", "nflows", 6.0),
            ("sbi-maf-10000", "log_prob", "flowjax", 2.0),
            ("sbi-maf-10000", "sample", "nflows", 50.0),
            ("sbi-maf-10000", "sample", "zuko", 50.0),
        )
    ),
    Goal("peak memory of train at K = 64, B 4,096: eager", 4.0, (("memory", "memory-64", "train"),), ("eager",), peaks),
    *(
        Goal(f"Glow, K 8, a training step: {name}", 1.4, (("glow", "glow-8", "step"),), (name,))
        for name in ("eager", "compile", "normflows")
    ),
    Goal(
        "peak memory of Glow's train at K = 32: eager", 3.0, (("glow", "glow-32, memory", "train"),), ("eager",), peaks
    ),
    Goal(
        "slogdet and inverse of 1,024 matrices, D 4 … 64: torch.linalg",
        3.0,
        tuple(("linear", f"linear-1024-{dim}", "forward") for dim in (4, 8, 12, 16, 24, 32, 48, 64)),
        ("torch.linalg",),
    ),
    *(
        Goal(
            f"converted flows of glf-mnist's size, {mode}: the original",
            3.0,
            tuple(("convert", f"glf-mnist of {kind}", mode) for kind in (*LIBRARIES, *KINDS)),
            ("original",),
        )
        for mode in ("train", "log_prob", "sample")
    ),
    Goal("sbi's NPE on two moons, training: sbi's default", 2.0, (("two_moons", "two-moons", "npe"),), ("sbi",)),
)


def _faster(what: str, least: float, keys: Sequence[Key], *against: str, graphed: tuple[str, ...] = ()) -> Goal:
    """`graphed`: with whom our graphs are compared, beside those with whom our calls are."""
    goal = Goal(what, least, tuple(keys), against, every=True)
    graphs = replace(goal, ours=f"{OURS}{GRAPHED}", against=(*against, *graphed), every=not graphed)
    return replace(goal, graphs=graphs)


def _near_floor(what: str, least: float, keys: Sequence[Key]) -> Goal:
    goal = Goal(what, least, tuple(keys))
    return replace(goal, graphs=replace(goal, needs=kernels))


def _flows() -> Iterator[Goal]:
    for cases, title in ((NAMED, "glf-cifar, glf-mnist, sbi"), (BATCHES, "glf-cifar at B = 1, 64, 1,024")):
        for mode in FLOW_MODES:
            eager, best = (10, 3) if mode == "train" else (20, 4)
            keys = [("flow", case.name, f"{mode}, tf32") for case in cases]
            yield _faster(f"{title}, {mode}: eager", eager, keys, "eager")
            yield _faster(f"{title}, {mode}: the best of compile, reduce-overhead, graphed eager", best, keys, *BEST)
    for mode in ("train", "log_prob"):
        keys = [("flow", "throughput", f"{mode}, tf32")]
        baselines = ("eager", "compile", f"eager{GRAPHED}")
        goal = Goal(f"B 65,536, {mode}: the best baseline", 1.5, tuple(keys), baselines, every=True)
        yield replace(goal, graphs=replace(goal, needs=kernels, against=("eager", "compile")))
    for mode in ("train", "log_prob"):
        yield _near_floor(f"B 65,536, {mode} in bf16: the matrix units", 0.4, [("flow", "throughput", f"{mode}, bf16")])


MEMORY = tuple(("memory", f"memory-{steps}", "train") for steps in (8, 64))
ORDERS = ("contiguous", "channels-last")
COUPLED = ("forward", "inverse", "train")
GPU: tuple[Goal, ...] = (
    *_flows(),
    Goal("peak memory of train at K = 64, B 4,096: eager", 5, MEMORY[1:], ("eager",), peaks),
    Flat("activations of train, reversible, K = 64 against 8", 1.1, MEMORY, (), activations, f"{OURS} reversible"),
    _faster(
        "slogdet and inverse of 16,384 and 1,024 matrices, D 8, 16, 32, 64: torch.linalg",
        10,
        [("linear", f"linear-{count}-{dim}", "forward") for count in (16384, 1024) for dim in (8, 16, 32, 64)],
        "torch.linalg",
        graphed=(f"torch.linalg{GRAPHED}",),
    ),
    _near_floor("slogdet and inverse of 16,384 matrices, D 32: the floor", 0.25, [("linear", "linear-16384-32", "forward")]),
    _near_floor(
        "elementwise coupling, (4096, 24, 16, 16): a copy",
        0.8,
        [("coupling", f"4096x24x16x16 {order}", mode) for order in ORDERS for mode in COUPLED],
    ),
    _near_floor(
        "elementwise coupling, 64 images: a copy",
        0.8,
        [
            ("coupling", f"{shape} {order}", mode)
            for shape in ("64x12x16x16", "64x24x8x8", "64x48x4x4")
            for order in ORDERS
            for mode in COUPLED
        ],
    ),
)  # fmt: skip


def processor_goals(machines: Sequence[Results]) -> Iterator[str]:
    """A table a processor."""
    suites = list(dict.fromkeys(race.suite for race in on_processor.races() if race.suite not in on_processor.LONG))
    for found in machines:
        if not found.machine.get("gpu"):
            yield from table(found, PROCESSOR, suites)


def gpu_goals(machines: Sequence[Results]) -> Iterator[str]:
    """A table a GPU."""
    suites = list(
        dict.fromkeys(race.suite for make in on_gpu.GROUPS.values() for race in make() if race.suite != "warm")
    )
    for found in machines:
        if found.machine.get("gpu"):
            yield from table(found, GPU, suites)
