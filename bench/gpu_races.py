"""A race of the GPU benchmark: the providers of one case and mode, checked one after the other and timed in turn."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import rehearsal, timing
from bench.results import Result, stats

__all__ = ["OURS_AND_EAGER", "Entry", "Missing", "Race", "rehearsing", "timed"]

SECONDS = 0.12  # of each provider's calls, and of each of its graphs
OURS_AND_EAGER = ("glf_fast", "eager")

clock: Any = timing  # or rehearsal


class Missing(Exception):
    """What cannot be measured here, and why."""


@dataclass
class Entry:
    """A provider whose results are right.

    Attributes:
        work: one call; None where there is nothing to time.
        copies: makes the passes that a graph holds, each over memory of its own, where the kernels alone are timed, too.
        conclude: what follows from the seconds of a call and of its kernels, which are a call's where they are not known alone.
    """

    work: Callable[[], object] | None
    info: dict[str, Any]
    copies: Callable[[], Sequence[Callable[[], object]]] | None = None
    conclude: Callable[[float, float], dict[str, Any]] = field(default=lambda call, kernels: {})


@dataclass(frozen=True)
class Race:
    """Those who run in turn. `enter` makes and checks one of them; it raises Missing, or AssertionError for what is wrong."""

    suite: str
    case: str
    mode: str
    names: tuple[str, ...]
    enter: Callable[[str], Entry]
    seconds: float = SECONDS

    def only(self, names: Sequence[str]) -> Race:
        """The same for these alone."""
        return Race(self.suite, self.case, self.mode, tuple(names), self.enter, self.seconds)


def rehearsing() -> bool:
    """On a processor, with small cases."""
    return clock is rehearsal


def timed(race: Race, entries: dict[str, Entry]) -> dict[str, Result | Exception]:
    """Results of those that entered: calls in turn, then each one's kernels alone; or what a call raised.

    Who got no turn before the GPU was lost has neither.
    """
    calls = clock.call_times({name: e.work for name, e in entries.items() if e.work}, race.seconds)
    found: dict[str, Result | Exception] = {}
    for name, entry in entries.items():
        info, times = dict(entry.info), [0.0]
        if entry.work:
            if (taken := calls.get(name)) is None:
                continue
            if isinstance(taken, Exception):
                found[name] = taken
                continue
            times, info["host_s"] = taken
            call = statistics.median(times)
            if entry.copies:
                info |= _kernels(entry.copies)
            kernels = info["graph_cold"]["median"] if "graph_cold" in info else call
            info |= entry.conclude(call, kernels)
        found[name] = Result(race.suite, race.case, race.mode, name, stats(times), info)
    return found


def _kernels(copies: Callable[[], Sequence[Callable[[], object]]]) -> dict[str, Any]:
    """Times of the kernels alone, from one graph over the passes; of one pass also where it finds the caches warm."""
    try:
        works = copies()
        graph = clock.Graph(*works)
        found = {"graph_cold": stats(graph.times(SECONDS, cold=True))}
        return found if len(works) > 1 else found | {"graph_warm": stats(graph.times(SECONDS / 2, cold=False))}
    except RuntimeError as error:  # what cannot be captured has still been called
        traceback.print_exc()
        return {"graph_failed": str(error)[:300]}
