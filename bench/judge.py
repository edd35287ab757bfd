"""The judge of goals: reached or missed, or not measured yet, in a table a machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.results import Key, Result, Results
from bench.tables import NOT_MEASURED, OURS, header, line, time

__all__ = ["Flat", "Goal", "activations", "kernels", "peaks", "table", "times"]

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


def activations(row: Result) -> list[float | None]:
    """Peak memory of a pass without gradients of the parameters, in bytes."""
    return [row.info.get("activation_bytes")]


@dataclass(frozen=True)
class Goal:
    """The best of `against` needs at least `least` times what glf_fast needs, in each of `keys`.

    Without `against` it is a floor that is compared: what the operations take at the machine's matrix rate, or the bytes at
    the bandwidth of a copy. `least` is the share of the time that it must be. With `every` there is no verdict before all of
    `against` were measured in all cases. `graphs`: the same on a GPU without the host: of our whole call, captured and
    replayed; where a floor is compared, of the kernels alone.
    """

    what: str
    least: float
    keys: tuple[Key, ...]
    against: tuple[str, ...] = ()
    needs: Callable[[Result], list[float | None]] = times
    ours: str = OURS
    every: bool = False
    graphs: Goal | None = None

    @property
    def limit(self) -> str:
        """`least`, for people."""
        return f"{self.least:g} ×" if self.against else f"{self.least:.0%} of the time"

    def ratios(self, rows: Rows) -> list[float]:
        """Ratios in one case, run by run; none where it was not measured."""
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
        """The measured ratios and the verdict: by the median of the runs, in the case that is worst."""
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

    def floor(self, groups: dict[Key, Rows]) -> str:
        """The floor, and our times, of the case that is worst."""
        measured = (self.graphs or self).measured(groups) or self.measured(groups)
        if not measured:
            return ""
        key = next(iter(measured))
        rows = groups[key]
        floor = next((row.info["yardstick_s"] for row in rows.values() if "yardstick_s" in row.info), None)
        if floor is None:
            return ""
        alone = [t for t in kernels(rows[OURS]) if t] if OURS in rows else []
        calls = [f"call {time(rows[OURS].median)}"] if OURS in rows and rows[OURS].median else []
        ours = [*calls, *(f"kernels {time(t)}" for t in alone)]
        return f"{time(floor)}; {', '.join(ours)}" + (f" ({key[1]})" if len(self.keys) > 1 else "")


@dataclass(frozen=True)
class Flat(Goal):
    """A goal that glf_fast needs in the last of two cases at most `least` times what it needs in the first."""

    @property
    def limit(self) -> str:
        """`least`, for people."""
        return f"at most {self.least:g} ×"

    def cells(self, groups: dict[Key, Rows]) -> list[str]:
        """The growth, and whether it is small enough."""
        found = [self.needs(groups[key][self.ours])[0] for key in self.keys if self.ours in groups.get(key, {})]
        if len(found) < 2 or not found[0] or not found[1]:
            return [NOT_MEASURED, ""]
        growth = found[1] / found[0]
        return [f"{growth:.2f}", "reached" if growth <= self.least else "**missed**"]


def _case(keys: Sequence[Key], key: Key) -> str:
    """A case's name, with its mode where the cases have several."""
    return key[1] if len({mode for _, _, mode in keys}) == 1 else f"{key[1]} {key[2]}"


def table(found: Results, goals: Sequence[Goal], suites: Sequence[str]) -> Iterator[str]:
    """The machine, the commit, the number of runs, and a row a goal; on a GPU both verdicts, and the floor.

    `suites`: those that could be measured there.
    """
    gpu = bool(found.machine.get("gpu"))
    runs = max((len(result.medians) for result in found.results), default=0)
    yield f"**{found.where}**; commit {found.machine['commit']}, {found.date[:10]}, {runs} run{'s' * (runs > 1)}:"
    yield ""
    twice = ["glf_fast against", "goal", "in calls", "", "in graphs", "", "floor; ours in the worst case"]
    yield from header(twice if gpu else ["glf_fast is faster, or smaller, than", "goal", "measured", ""])
    groups = found.groups()
    for goal in goals:
        graphs = goal.graphs.cells(groups) if goal.graphs else ["–", ""]
        yield line([goal.what, goal.limit, *goal.cells(groups), *([*graphs, goal.floor(groups)] if gpu else [])])
    if missing := [suite for suite in suites if not found.suite(suite)]:
        yield ""
        yield f"Suites that were not measured there yet: {', '.join(missing)}."
    yield ""
