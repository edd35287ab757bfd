"""Where a processor's results stand against the goals of the design: reached or missed, or not measured yet."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.kinds import KINDS
from bench.results import Key, Result, Results
from bench.tables import NOT_MEASURED, OURS, header, line

__all__ = ["GOALS", "Goal", "goals"]

LIBRARIES = ("normflows", "nflows", "zuko", "FrEIA")
Rows = dict[str, Result]


def times(row: Result) -> list[float | None]:
    """Seconds, run by run."""
    return row.medians


def peaks(row: Result) -> list[float | None]:
    """Peak memory in bytes."""
    return [row.info["peak_bytes"]]


@dataclass(frozen=True)
class Goal:
    """The best of `against` needs at least `least` times what glf_fast needs, in each of `keys`."""

    what: str
    least: float
    keys: tuple[Key, ...]
    against: tuple[str, ...]
    needs: Callable[[Result], list[float | None]] = times
    ours: str = OURS

    def ratios(self, rows: Rows) -> list[float]:
        """Of one case, run by run."""
        own = self.needs(rows[self.ours])
        others = [self.needs(rows[name]) for name in self.against if name in rows]
        best = [min((t for t in run if t), default=None) for run in zip(*others, strict=True)]
        return [theirs / t for theirs, t in zip(best, own, strict=True) if theirs and t]

    def cells(self, groups: dict[Key, Rows]) -> list[str]:
        """What was measured, and what that makes of the goal: by the median of the runs, in the case that is worst."""
        found = {key: groups.get(key, {}) for key in self.keys}
        measured = {
            key: runs for key, rows in found.items() if self.ours in rows and rows.keys() & {*self.against}
            if (runs := self.ratios(rows))
        }  # fmt: skip
        if not measured:
            return [NOT_MEASURED, ""]
        worst = min(measured, key=lambda key: statistics.median(measured[key]))
        runs = measured[worst]
        text = f"{statistics.median(runs):.2f}"
        if len(runs) > 1:
            text += f" ({min(runs):.2f} – {max(runs):.2f})"
        if len(self.keys) > 1:
            text += f", the least: {worst[1]}"
        if missing := [key[1] for key in self.keys if key not in measured]:
            return [f"{text}; not measured: {', '.join(missing)}", ""]
        if absent := sorted({name for rows in found.values() for name in self.against if name not in rows}):
            text += f"; without {', '.join(absent)}" if len(self.keys) == 1 else ""
        return [text, "reached" if statistics.median(runs) >= self.least else "**missed**"]


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
        runs = max(len(result.medians) for result in found.results)
        yield f"**{found.where}**; commit {found.machine['commit']}, {found.date[:10]}, {runs} run{'s' * (runs > 1)}:"
        yield ""
        yield from header(["glf_fast is faster, or smaller, than", "goal", "measured", ""])
        groups = found.groups()
        for goal in GOALS:
            yield line([goal.what, f"{goal.least:g} ×", *goal.cells(groups)])
        if missing := [suite for suite in SUITES if not found.suite(suite)]:
            yield ""
            yield f"Suites that were not measured there yet: {', '.join(missing)}."
        yield ""
