"""What the rows of one part of the GPU benchmark share: the clock that measures them, and the end of the part's time."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from typing import Any

from bench import rehearsal, timing
from bench.results import Result, stats

__all__ = [
    "OURS_AND_EAGER",
    "SECONDS",
    "Job",
    "Measured",
    "Missing",
    "OutOfTime",
    "check_time",
    "rehearsing",
    "replays",
]

SECONDS = 0.25  # of each measurement
OURS_AND_EAGER = ("glf_fast", "eager")

Measured = Callable[[], Result]
# One row to be: suite, case, mode, provider, and what measures it. It raises AssertionError for what is wrong.
Job = tuple[str, str, str, str, Measured]

clock: Any = timing  # or rehearsal
end = math.inf  # of the part's time


class Missing(Exception):
    """What cannot be measured here, and why."""


class OutOfTime(Exception):
    """The part's time is over."""


def check_time() -> None:
    """Between a row's steps, each of which is short."""
    if time.monotonic() > end:
        raise OutOfTime


def rehearsing() -> bool:
    """On a processor, with small cases."""
    return clock is rehearsal


def replays(*works: Callable[[], object]) -> dict[str, Any]:
    """Times of the kernels alone, from one graph over `works`; of one work also where it finds the caches warm."""
    if time.monotonic() > end:
        return {"graph_failed": "out of time"}
    try:
        graph = clock.Graph(*works)
        found = {"graph_cold": stats(graph.times(SECONDS, cold=True))}
        return found if len(works) > 1 else found | {"graph_warm": stats(graph.times(SECONDS, cold=False))}
    except RuntimeError as error:  # what cannot be captured has still been called
        traceback.print_exc()
        return {"graph_failed": str(error)[:300]}
