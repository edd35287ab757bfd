"""What was predicted for a GPU before one was at hand, beside what was measured: bench/predictions.json.

A row predicts microseconds, the least and the most, of a provider's kernels alone (`kernels_us`) or of its calls (`call_us`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.results import Results
from bench.tables import NOT_MEASURED, header, line, time

__all__ = ["FILE", "predictions"]

FILE = Path(__file__).with_name("predictions.json")


def predictions(found: Results) -> Iterator[str]:
    """A table for a GPU: predicted, measured, and measured over the nearest that was predicted. Nothing for a processor."""
    if not found.machine.get("gpu"):
        return
    made = json.loads(FILE.read_text())
    groups = found.groups()
    yield from ("", "## Predicted and measured", "", f"Predicted by {made['source']}.", "")
    yield from header(["", "provider", "of", "predicted", "measured", "measured / predicted"])
    for row in made["rows"]:
        result = groups.get((row["suite"], row["case"], row["mode"]), {}).get(row["provider"])
        for what, of in (("kernels_us", "kernels"), ("call_us", "call")):
            if what in row:
                least, most = (us / 1e6 for us in row[what])
                measured = None if result is None else result.median if of == "call" else _kernels(result.info)
                span = time(least) if least == most else f"{time(least)} – {time(most)}"
                seen = (
                    [time(measured), f"{measured / min(max(measured, least), most):.2f}"]
                    if measured
                    else [NOT_MEASURED, ""]
                )
                yield line([f"{row['case']}, {row['mode']}", row["provider"], of, span, *seen])


def _kernels(info: dict[str, Any]) -> float | None:
    """From a graph that finds its weights in the L2 cache, as predicted; where only a cold one was timed, from that."""
    timed = info.get("graph_warm") or info.get("graph_cold")
    return timed["median"] if timed else None
