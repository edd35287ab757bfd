"""Result files: what was measured on one machine, by suite, case, mode and provider, in one run or in several.

A suite's name is that of its test: `test_flow[…]` is a result of the suite "flow". What a suite says beside its times is in
`info`.
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

KEPT = ("min", "q1", "median", "q3", "max", "rounds")
Key = tuple[str, str, str]  # suite, case, mode


@dataclass
class Result:
    """One provider's times in one case and mode, in seconds."""

    suite: str
    case: str
    mode: str
    provider: str
    stats: dict[str, float]  # of the first run
    info: dict[str, Any]  # of the first run: operations, bytes, floor_s, …
    medians: list[float] = field(default_factory=list)  # of all runs

    def __post_init__(self) -> None:
        self.medians = self.medians or [self.stats["median"]]

    @property
    def median(self) -> float:
        """Seconds, in the first run."""
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
    whole = json.loads(path.read_text())
    if "benchmarks" not in whole:
        return Results(whole["machine"], whole["date"], [Result(**row) for row in whole["results"]], whole["wrong"])
    machine = whole["machine_info"]
    cpu = machine.get("cpu", {})
    known = ("brand_raw", "arch", "l2_cache_size", "l3_cache_size")
    machine["cpu"] = {name: cpu[name] for name in known if name in cpu}
    rows = []
    for row in whole["benchmarks"]:
        info = row["extra_info"]
        case, mode, provider = (info.pop(name) for name in ("case", "mode", "provider"))
        suite = row["name"].split("[")[0].removeprefix("test_")
        rows.append(Result(suite, case, mode, provider, {name: row["stats"][name] for name in KEPT}, info))
    return Results(machine, whole["datetime"], rows)


def write(results: Results, path: Path) -> None:
    """Whole, or not at all: who is stopped in between leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(results), indent=1) + "\n")
    os.replace(temporary, path)


def merge(files: Iterable[Results]) -> Results:
    """One machine's files as one: what only one has is taken over, what several have are repeated runs.

    Raises:
        ValueError: they are of different machines or commits.
    """
    first, *others = files
    for other in others:
        for name in ("commit", "torch", "cores", "gpu"):
            if other.machine.get(name) != first.machine.get(name):
                raise ValueError(
                    f"runs of one {name} can be merged; got {first.machine.get(name)} and {other.machine.get(name)}"
                )
        known = {(r.key, r.provider): r for r in first.results}
        for result in other.results:
            if (result.key, result.provider) in known:
                known[result.key, result.provider].medians += result.medians
            else:
                first.results.append(result)
        first.wrong += other.wrong
    return first
