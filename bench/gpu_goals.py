"""Where a GPU's results stand against the goals of the design, judged twice: in calls, and in graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.baselines import GRAPHED
from bench.goals import Goal, Rows, heading, kernels, peaks, unmeasured
from bench.gpu_calls import BATCHES, NAMED
from bench.gpu_flows import FLOW_MODES
from bench.results import Key, Result, Results
from bench.tables import OURS, header, line, time

__all__ = ["GPU_GOALS", "Twice", "gpu_goals"]

BEST = ("compile", "reduce-overhead", f"eager{GRAPHED}")


@dataclass(frozen=True)
class Twice:
    """A goal of calls with the host in them, and the same of graphs: of our whole call, captured and replayed.

    Where a floor is compared the graphs hold the kernels alone. Without `graphs` there is nothing to capture.
    """

    calls: Goal
    graphs: Goal | None

    def row(self, groups: dict[Key, Rows]) -> str:
        """A line of the table: both verdicts, and for the case that is worst the floor beside our times."""
        nothing = ["–", ""]
        twice = [*self.calls.cells(groups), *(self.graphs.cells(groups) if self.graphs else nothing)]
        return line([self.calls.what, self.calls.limit, *twice, self._floor(groups)])

    def _floor(self, groups: dict[Key, Rows]) -> str:
        measured = (self.graphs or self.calls).measured(groups) or self.calls.measured(groups)
        if not measured:
            return ""
        key = next(iter(measured))
        rows = groups[key]
        floor = next((row.info["yardstick_s"] for row in rows.values() if "yardstick_s" in row.info), None)
        if floor is None:
            return ""
        alone = [t for t in kernels(rows[OURS]) if t] if OURS in rows else []
        ours = [
            f"{title} {time(t)}" for title, t in (("call", _median(rows, OURS)), *(("kernels", t) for t in alone)) if t
        ]
        return f"{time(floor)}; {', '.join(ours)}" + (f" ({key[1]})" if len(self.calls.keys) > 1 else "")


@dataclass(frozen=True)
class Flat(Goal):
    """What glf_fast needs in the last of two cases is at most `least` times what it needs in the first."""

    @property
    def limit(self) -> str:
        """`least`, for people."""
        return f"at most {self.least:g} ×"

    def cells(self, groups: dict[Key, Rows]) -> list[str]:
        """The growth, and whether it is small enough."""
        found = [self.needs(groups[key][self.ours])[0] for key in self.keys if self.ours in groups.get(key, {})]
        if len(found) < 2 or not found[0] or not found[1]:
            return ["not measured yet", ""]
        growth = found[1] / found[0]
        return [f"{growth:.2f}", "reached" if growth <= self.least else "**missed**"]


def _median(rows: Rows, name: str) -> float | None:
    return rows[name].median if name in rows else None


def activations(row: Result) -> list[float | None]:
    """Peak memory of a pass without gradients of the parameters, in bytes."""
    return [row.info.get("activation_bytes")]


def _faster(what: str, least: float, keys: Sequence[Key], *against: str, graphed: tuple[str, ...] = ()) -> Twice:
    """`graphed`: with whom our graphs are compared, beside those with whom our calls are."""
    goal = Goal(what, least, tuple(keys), against, every=True)
    return Twice(goal, replace(goal, ours=f"{OURS}{GRAPHED}", against=(*against, *graphed), every=not graphed))


def _near_floor(what: str, least: float, keys: Sequence[Key]) -> Twice:
    goal = Goal(what, least, tuple(keys))
    return Twice(goal, replace(goal, needs=kernels))


def _flows() -> Iterator[Twice]:
    for cases, title in ((NAMED, "glf-cifar, glf-mnist, sbi"), (BATCHES, "glf-cifar at B = 1, 64, 1,024")):
        for mode in FLOW_MODES:
            eager, best = (10, 3) if mode == "train" else (20, 4)
            keys = [("gpu_flow", case.name, f"{mode}, tf32") for case in cases]
            yield _faster(f"{title}, {mode}: eager", eager, keys, "eager")
            yield _faster(f"{title}, {mode}: the best of compile, reduce-overhead, graphed eager", best, keys, *BEST)
    for mode in ("train", "log_prob"):
        keys = [("gpu_flow", "throughput", f"{mode}, tf32")]
        baselines = ("eager", "compile", f"eager{GRAPHED}")
        goal = Goal(f"B 65,536, {mode}: the best baseline", 1.5, tuple(keys), baselines, every=True)
        yield Twice(goal, replace(goal, needs=kernels, against=("eager", "compile")))
    for mode in ("train", "log_prob"):
        yield _near_floor(
            f"B 65,536, {mode} in bf16: the matrix units", 0.4, [("gpu_flow", "throughput", f"{mode}, bf16")]
        )


MEMORY = tuple(("memory", f"memory-{steps}", "train") for steps in (8, 64))
ORDERS = ("contiguous", "channels-last")
COUPLED = ("forward", "inverse", "train")
GPU_GOALS: tuple[Twice, ...] = (
    *_flows(),
    Twice(Goal("peak memory of train at K = 64, B 4,096: eager", 5, MEMORY[1:], ("eager",), peaks), None),
    Twice(Flat("activations of train, reversible, K = 64 against 8", 1.1, MEMORY, (), activations, f"{OURS} reversible"), None),
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
# What `make gpu` and `make gpu-again` measure.
SUITES = (
    "gpu_flow", "memory", "linear", "coupling", "train_step", "grid", "depth", "assemble", "apply", "launches",
)  # fmt: skip


def gpu_goals(machines: Sequence[Results]) -> Iterator[str]:
    """A table a GPU."""
    for found in machines:
        if not found.machine.get("gpu"):
            continue
        yield from heading(found)
        yield from header(
            ["glf_fast against", "goal", "in calls", "", "in graphs", "", "floor; ours in the worst case"]
        )
        groups = found.groups()
        for goal in GPU_GOALS:
            yield goal.row(groups)
        yield from unmeasured(found, SUITES)
