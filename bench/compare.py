"""What became slower: `python -m bench.compare A B`, each a kept file of bench/results or one of pytest-benchmark's.

Times are taken relative to the other providers' in the same run (the geometric mean of those that both files have), so that a
busier machine is no regression. Noise is what repeated runs of the same code differ by, so at least one side must hold
some: `python -m bench.report --keep MACHINE RUN RUN …` puts them into one file. A case is named when it is slower by more
than three standard errors; the deviation of one run is the case's own or the suite's over all its cases, the larger one,
because a few runs of one case may agree by chance. Exits with 1 when there is one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.results import Key, Result, Results, read

__all__ = ["Change", "compare", "main"]

OURS = "glf_fast"
NOT_TIMES = ("memory", "launches")
ERRORS = 3.0  # standard errors: of 100 cases that did not change, one comparison in seven names one


@dataclass(frozen=True)
class Change:
    """Of our time in one case and mode: 0.1 is 10 % slower."""

    key: Key
    change: float
    noise: float  # what a change must exceed to be one

    @property
    def slower(self) -> bool:
        """By more than the noise."""
        return self.change > self.noise


def relative(rows: dict[str, Result], others: list[str]) -> list[float]:
    """Our log-time minus the others' mean one, run by run; without others, our log-time."""
    runs = []
    for i, ours in enumerate(rows[OURS].medians):
        theirs = [math.log(rows[name].medians[i]) for name in others]
        runs.append(math.log(ours) - (statistics.fmean(theirs) if theirs else 0.0))
    return runs


def compare(before: Results, after: Results) -> list[Change]:
    """Of all cases of ours that both have.

    Raises:
        ValueError: neither has repeated runs of a suite, so its noise is not known.
    """
    sides = (before.groups(), after.groups())
    pairs: dict[Key, tuple[list[float], list[float]]] = {}
    for key in sides[0].keys() & sides[1].keys():
        a, b = (side[key] for side in sides)
        if OURS in a and OURS in b and key[0] not in NOT_TIMES:
            runs = len(a[OURS].medians), len(b[OURS].medians)
            others = [n for n in a.keys() & b.keys() if n != OURS and (len(a[n].medians), len(b[n].medians)) == runs]
            pairs[key] = relative(a, sorted(others)), relative(b, sorted(others))
    spread: dict[str, list[tuple[float, int]]] = {}  # suite → variance and degrees of freedom of each side of each case
    for (suite, *_), pair in pairs.items():
        spread.setdefault(suite, []).extend(_variance(runs) for runs in pair)
    changes = []
    for key, (a_runs, b_runs) in sorted(pairs.items()):
        if not sum(freedom for _, freedom in spread[key[0]]):
            raise ValueError(
                f"the suite {key[0]!r} was run once on each side, so its noise is not known: "
                "merge repeated runs of one side with python -m bench.report --keep MACHINE RUN RUN …"
            )
        variance = max(_pooled(spread[key[0]]), _pooled([_variance(a_runs), _variance(b_runs)]))
        noise = ERRORS * math.sqrt(variance * (1 / len(a_runs) + 1 / len(b_runs)))
        change = statistics.fmean(b_runs) - statistics.fmean(a_runs)
        changes.append(Change(key, math.expm1(change), math.expm1(noise)))
    return changes


def _variance(runs: list[float]) -> tuple[float, int]:
    return (statistics.variance(runs) if len(runs) > 1 else 0.0), len(runs) - 1


def _pooled(parts: list[tuple[float, int]]) -> float:
    freedom = sum(n for _, n in parts)
    return sum(variance * n for variance, n in parts) / freedom if freedom else 0.0


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    try:
        changes = compare(read(arguments.before), read(arguments.after))
    except ValueError as error:
        sys.exit(str(error))
    print("| | change of glf_fast's time | noise | |\n|---|---|---|---|")
    for c in sorted(changes, key=lambda c: c.noise - c.change):
        print(f"| {' '.join(c.key)} | {c.change:+.1%} | {c.noise:.1%} | {'slower' if c.slower else ''} |")
    if not changes:
        sys.exit("the files have no case of glf_fast in common")
    sys.exit(any(c.slower for c in changes))


if __name__ == "__main__":
    main()
