"""Result files: what was measured on one machine, by suite, case, mode and provider, in one run or in several.

What a suite says beside its times is in `info`. pytest-benchmark's files carry the same results as what it calls extra_info.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Key", "Result", "Results", "merge", "read", "stats", "write"]

Key = tuple[str, str, str]  # suite, case, mode


@dataclass
class Result:
    """One provider's times in one case and mode, in seconds."""

    suite: str
    case: str
    mode: str
    provider: str
    stats: dict[str, float]  # of the first run that it has a time in
    info: dict[str, Any]  # of that run: operations, bytes, yardstick_s, …
    medians: list[float | None] = field(default_factory=list)  # of all runs; None where it has no time

    def __post_init__(self) -> None:
        self.medians = self.medians or [self.stats["median"]]

    @property
    def median(self) -> float:
        """Seconds, in the first run that it has a time in."""
        return self.stats["median"]

    @property
    def key(self) -> Key:
        """What it is compared within."""
        return self.suite, self.case, self.mode


@dataclass
class Results:
    """One machine's results."""

    machine: dict[str, Any]  # with versions and commit
    date: str
    results: list[Result]
    wrong: list[str] = field(default_factory=list)  # what is not right, or could not be measured, and so has no time

    @property
    def setting(self) -> dict[str, Any]:
        """What times depend on beside our code."""
        machine = self.machine
        names = ("cores", "threads", "gpu", "torch")
        return {"processor": machine.get("cpu", {}).get("brand_raw"), **{name: machine.get(name) for name in names}}

    @property
    def where(self) -> str:
        """The GPU, or the processor and its cores."""
        machine = self.machine
        processor = machine.get("cpu", {}).get("brand_raw", "a processor that does not say its name")
        return machine.get("gpu") or f"{processor}, {machine['cores']} cores"

    def suite(self, name: str) -> list[Result]:
        """Those of one suite."""
        return [result for result in self.results if result.suite == name]

    def groups(self) -> dict[Key, dict[str, Result]]:
        """Those of one suite, case and mode together, by provider."""
        found: dict[Key, dict[str, Result]] = {}
        for result in self.results:
            found.setdefault(result.key, {})[result.provider] = result
        return found


def stats(times: Sequence[float]) -> dict[str, float]:
    """What is kept of a list of seconds."""
    q1, median, q3 = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {"min": min(times), "q1": q1, "median": median, "q3": q3, "max": max(times), "rounds": len(times)}


def read(path: Path) -> Results:
    """A file that `write` wrote, or one of pytest-benchmark's: that without raw data and private details of the computer."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    if "benchmarks" not in whole:
        return Results(whole["machine"], whole["date"], [Result(**row) for row in whole["results"]], whole["wrong"])
    machine = whole["machine_info"]
    cpu = machine.get("cpu", {})
    known = ("brand_raw", "arch", "l2_cache_size", "l3_cache_size")
    machine["cpu"] = {name: cpu[name] for name in known if name in cpu}
    rows = [Result(**row["extra_info"]) for row in whole["benchmarks"]]
    return Results(machine, whole["datetime"], rows, whole.get("wrong", []))


def write(results: Results, path: Path) -> None:
    """Whole, or not at all: who is stopped in between leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(results), indent=1) + "\n")
    os.replace(temporary, path)


def merge(files: Iterable[Results]) -> Results:
    """One machine's files as one: what only one has is taken over, what several have are repeated runs.

    Run i of a case is run i of all its providers: who has no time in it (its result was wrong, say) has None there.

    Raises:
        ValueError: they are of different machines, versions of torch or commits.
    """
    first, *others = files
    for other in others:
        ours, theirs = ({"commit": found.machine["commit"], **found.setting} for found in (first, other))
        for name in ours:
            if ours[name] != theirs[name]:
                raise ValueError(f"runs of one {name} can be merged; got {ours[name]} and {theirs[name]}")
        groups = first.groups()
        for key, rows in other.groups().items():
            first.results += _join(groups.get(key, {}), rows)
        first.wrong = list(dict.fromkeys(first.wrong + other.wrong))
    return first


def _join(known: dict[str, Result], rows: dict[str, Result]) -> list[Result]:
    """Add one case's rows to those of earlier runs; returns those of providers that are new to it.

    It was run again if both have a provider; rows of other providers alone belong to the same run.
    """
    again = bool(known.keys() & rows.keys())
    before = max((len(row.medians) for row in known.values()), default=0) if again else 0
    nothing: list[float | None] = [None]
    new = [row for name, row in rows.items() if name not in known]
    for row in new:
        row.medians = nothing * before + row.medians
    for name, row in known.items():
        if name in rows:
            row.medians += rows[name].medians
    whole = [*known.values(), *new]
    runs = max(len(row.medians) for row in whole)
    for row in whole:
        row.medians += nothing * (runs - len(row.medians))
    return new
