"""Where a machine's results stand against the goals of the design: reached or missed, or not measured yet."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.kinds import KINDS
from bench.results import Key, Result, Results
from bench.tables import NOT_MEASURED, OURS, header, line

__all__ = ["GOALS", "Goal", "Rows", "goals", "heading", "kernels", "peaks", "times", "unmeasured"]

LIBRARIES = ("normflows", "nflows", "zuko", "FrEIA")
Rows = dict[str, Result]


def times(row: Result) -> list[float | None]:
    """Seconds, run by run."""
    return row.medians


def peaks(row: Result) -> list[float | None]:
    """Peak memory in bytes."""
    return [row.info["peak_bytes"]]


def kernels(row: Result) -> list[float | None]:
    """Seconds of the kernels alone, from a graph that finds the L2 cache cold."""
    return [row.info["graph_cold"]["median"] if "graph_cold" in row.info else None]


@dataclass(frozen=True)
class Goal:
    """The best of `against` needs at least `least` times what glf_fast needs, in each of `keys`.

    Without `against` it is a floor that is compared: what the operations take at the machine's matrix rate, or the bytes at
    the bandwidth of a copy. `least` is the share of the time that it must be. With `every` there is no verdict before all of
    `against` were measured in all cases.
    """

    what: str
    least: float
    keys: tuple[Key, ...]
    against: tuple[str, ...] = ()
    needs: Callable[[Result], list[float | None]] = times
    ours: str = OURS
    every: bool = False

    @property
    def limit(self) -> str:
        """`least`, for people."""
        return f"{self.least:g} ×" if self.against else f"{self.least:.0%} of the time"

    def ratios(self, rows: Rows) -> list[float]:
        """Of one case, run by run; none where it was not measured."""
        if self.ours not in rows:
            return []
        own = self.needs(rows[self.ours])
        if not self.against:
            floor: float = rows[self.ours].info["yardstick_s"]
            return [floor / t for t in own if t]
        others = [self.needs(rows[name]) for name in self.against if name in rows]
        best = [min((t for t in run if t), default=None) for run in zip(*others, strict=True)]
        return [theirs / t for theirs, t in zip(best, own, strict=True) if theirs and t] if others else []

    def measured(self, groups: dict[Key, Rows]) -> dict[Key, list[float]]:
        """Ratios of the cases that have any, the worst first by the median of its runs."""
        found = {key: self.ratios(groups.get(key, {})) for key in self.keys}
        return dict(sorted(((k, r) for k, r in found.items() if r), key=lambda item: statistics.median(item[1])))

    def cells(self, groups: dict[Key, Rows]) -> list[str]:
        """What was measured, and what that makes of the goal: by the median of the runs, in the case that is worst."""
        measured = self.measured(groups)
        if not measured:
            return [NOT_MEASURED, ""]
        worst, runs = next(iter(measured.items()))
        form = ".2f" if self.against else ".0%"
        text = f"{statistics.median(runs):{form}}"
        if len(runs) > 1:
            text += f" ({min(runs):{form}} – {max(runs):{form}})"
        if len(self.keys) > 1:
            text += f", the least: {_case(self.keys, worst)}"
        if missing := [_case(self.keys, key) for key in self.keys if key not in measured]:
            return [f"{text}; not measured: {', '.join(missing)}", ""]
        if absent := sorted({name for key in self.keys for name in self.against if name not in groups[key]}):
            where = [_case(self.keys, key) for key in self.keys if not {*self.against} <= groups[key].keys()]
            text += f"; without {', '.join(absent)}"
            text += f" in {', '.join(where)}" if 1 < len(self.keys) != len(where) else ""
            if self.every:
                return [text, ""]
        return [text, "reached" if statistics.median(runs) >= self.least else "**missed**"]


def _case(keys: Sequence[Key], key: Key) -> str:
    """A case's name, with its mode where the cases have several."""
    return key[1] if len({mode for _, _, mode in keys}) == 1 else f"{key[1]} {key[2]}"


def _flow(case: str, mode: str) -> tuple[Key]:
    return (("flow", case, mode),)


GOALS: tuple[Goal, ...] = (
    Goal("glf-cifar, train: the best library", 1.7, _flow("glf-cifar", "train"), LIBRARIES),
    Goal("glf-cifar, train: torch.compile", 1.7, _flow("glf-cifar", "train"), ("compile",)),
    *(
        Goal(f"{case}, train: {who}", least, _flow(case, "train"), against)
        for case in ("glf-mnist", "sbi")
        for who, least, against in (("the best library", 4.0, LIBRARIES), ("torch.compile", 2.5, ("compile",)))
    ),
    *(
        Goal(f"D 64, H 256, K 8, B = {batch}, {mode}: eager", least, _flow(f"small-batch-{batch}", mode), ("eager",))
        for batch, least in ((1, 10.0), (16, 5.0), (64, 3.0))
        for mode in ("log_prob", "sample")
    ),
    Goal("peak memory of train at K = 64, B 4,096: eager", 4.0, (("memory", "memory-64", "train"),), ("eager",), peaks),
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
# What `make bench` measures.
SUITES = ("flow", "depth", "grid", "memory", "coupling", "linear", "apply", "assemble", "train_step", "convert")


def goals(machines: Sequence[Results]) -> Iterator[str]:
    """A table a processor: how many times as much the others need, the goal, and whether it is reached."""
    for found in machines:
        if found.machine.get("gpu"):
            continue
        yield from heading(found)
        yield from header(["glf_fast is faster, or smaller, than", "goal", "measured", ""])
        groups = found.groups()
        for goal in GOALS:
            yield line([goal.what, goal.limit, *goal.cells(groups)])
        yield from unmeasured(found, SUITES)


def heading(found: Results) -> Iterator[str]:
    """The machine, the commit and the number of runs."""
    runs = max((len(result.medians) for result in found.results), default=0)
    yield f"**{found.where}**; commit {found.machine['commit']}, {found.date[:10]}, {runs} run{'s' * (runs > 1)}:"
    yield ""


def unmeasured(found: Results, suites: Sequence[str]) -> Iterator[str]:
    """A line on the suites that have no results."""
    if missing := [suite for suite in suites if not found.suite(suite)]:
        yield ""
        yield f"Suites that were not measured there yet: {', '.join(missing)}."
    yield ""
