"""Result files: what pytest-benchmark measured, without its raw data, one file a machine and suite."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Result", "read", "trim"]

KEPT = ("min", "q1", "median", "q3", "max", "rounds")


@dataclass(frozen=True)
class Result:
    """One provider's times in one case and mode, in seconds."""

    case: str
    mode: str
    provider: str
    stats: dict[str, float]
    info: dict[str, Any]  # operations, bytes, floor_s, …

    @property
    def median(self) -> float:
        """Seconds."""
        return self.stats["median"]


def trim(path: Path) -> dict[str, Any]:
    """pytest-benchmark's JSON without raw data and without what says more about a computer than a reader needs."""
    whole = json.loads(path.read_text())
    machine = whole["machine_info"]
    cpu = machine.get("cpu", {})
    machine["cpu"] = {
        name: cpu[name] for name in ("brand_raw", "arch", "l2_cache_size", "l3_cache_size") if name in cpu
    }
    rows = [
        {
            "name": row["name"],
            "stats": {name: row["stats"][name] for name in KEPT},
            "info": row["extra_info"],
        }
        for row in whole["benchmarks"]
    ]
    return {"machine": machine, "date": whole["datetime"], "results": rows}


def read(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """A trimmed file: the machine, and its results."""
    whole = json.loads(path.read_text())
    return whole["machine"] | {"date": whole["date"]}, [
        Result(row["info"]["case"], row["info"]["mode"], row["info"]["provider"], row["stats"], row["info"])
        for row in whole["results"]
    ]
