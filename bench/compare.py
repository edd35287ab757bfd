"""Find what became slower: `python -m bench.compare A B`, each a kept file of bench/results or one of pytest-benchmark's.

Times are taken relative to the swing of the machine, so that a busier one is no regression: the median over the providers of
how their times changed, which a provider that moved alone has no say in. Baselines that moved by themselves are named, too.
Noise is what repeated runs of the same code differ by, so at least one side must hold some: `python -m bench.report --keep
MACHINE RUN RUN …` puts them into one file. Runs made one right after the other agree better than those of another hour: make
those of A and of B in turn. A case is named when it is slower by more than three standard errors; the deviation of one run is
the case's own or the suite's over all its cases, the larger one, because a few runs of one case may agree by chance.

Exits with 1 when a case of glf_fast is slower, or has no time any more (its result became wrong, or it was not run).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.results import Key, Result, Results, read

__all__ = ["Change", "compare", "main", "vanished", "why_not"]

OURS = "glf_fast"
NOT_TIMES = ("memory", "launches")
ERRORS = 3.0  # standard errors: of 100 cases that did not change, one comparison in seven names one

Rows = dict[str, Result]
Runs = list[float]  # log-times, run by run, relative to the machine's
Swings = dict[int, float]  # run → log-time


@dataclass(frozen=True)
class Change:
    """The change of a provider's time in one case and mode: 0.1 is 10 % slower."""

    key: Key
    provider: str
    change: float
    noise: float  # what a change must exceed to be one

    @property
    def slower(self) -> bool:
        """By more than the noise."""
        return self.change > self.noise

    @property
    def moved(self) -> bool:
        """Slower or faster by more than the noise."""
        return abs(math.log1p(self.change)) > math.log1p(self.noise)


def why_not(before: Results, after: Results) -> str:
    """Why the files cannot be compared, or ""."""
    a, b = before.setting, after.setting
    differ = [f"{name}: {a[name]} and {b[name]}" for name in a if name != "torch" and a[name] != b[name]]
    return f"the files are of different machines ({', '.join(differ)})" if differ else ""


def vanished(before: Results, after: Results) -> list[Key]:
    """Cases that had a time of ours and have none any more."""
    a, b = ({key for key, rows in side.groups().items() if OURS in rows} for side in (before, after))
    return sorted(a - b)


def relative(name: str, before: Rows, after: Rows, swings: tuple[Swings, Swings]) -> tuple[Runs, Runs]:
    """One provider's log-times in both files, less the machine's swing in each run: the median of the others' shifts.

    Of an even number, whose median would be the mean of two, it is that of the two which is nearer to the whole suite's swing.
    """
    shifts = shifts_of(before, after)
    runs: tuple[Runs, Runs] = [], []
    for side, found in enumerate(runs):
        for i, own in shifts[name][side].items():
            others = sorted(shifts[n][side][i] for n in shifts if n != name and i in shifts[n][side])
            middle = others[(len(others) - 1) // 2 : len(others) // 2 + 1]
            found.append(own - min(middle, key=lambda shift: abs(shift - swings[side][i]), default=0.0))
    return runs


def shifts_of(before: Rows, after: Rows) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
    """Provider → run → how far its log-time is from its mean before; of both files."""
    found = {}
    for name in before.keys() & after.keys():
        a, b = _logs(before[name]), _logs(after[name])
        usual = statistics.fmean(a.values())
        found[name] = {i: t - usual for i, t in a.items()}, {i: t - usual for i, t in b.items()}
    return found


def swings_of(pairs: Iterable[tuple[Rows, Rows]]) -> tuple[Swings, Swings]:
    """Run → the median shift over all cases and providers of a suite, in both files."""
    found: tuple[dict[int, list[float]], dict[int, list[float]]] = {}, {}
    for before, after in pairs:
        for sides in shifts_of(before, after).values():
            for runs, side in zip(found, sides, strict=True):
                for i, shift in side.items():
                    runs.setdefault(i, []).append(shift)
    a, b = ({i: statistics.median(shifts) for i, shifts in runs.items()} for runs in found)
    return a, b


def _logs(row: Result) -> dict[int, float]:
    """Log-times of the runs that have a time."""
    return {i: math.log(seconds) for i, seconds in enumerate(row.medians) if seconds}


def compare(before: Results, after: Results) -> list[Change]:
    """Changes in all cases and providers that both files have; a baseline's only where there are others to tell that it moved.

    Raises:
        ValueError: neither has repeated runs of a suite, so its noise is not known.
    """
    suites: dict[str, dict[Key, tuple[Rows, Rows]]] = {}
    sides = (before.groups(), after.groups())
    for key in sorted(sides[0].keys() & sides[1].keys()):
        if key[0] not in NOT_TIMES:
            a, b = ({n: row for n, row in side[key].items() if _logs(row)} for side in sides)
            suites.setdefault(key[0], {})[key] = a, b
    pairs: dict[tuple[Key, str], tuple[Runs, Runs]] = {}
    for cases in suites.values():
        swings = swings_of(cases.values())
        for key, (a, b) in cases.items():
            both = [name for name in a if name in b]
            for name in both if len(both) > 2 else [name for name in both if name == OURS]:
                pairs[key, name] = relative(name, a, b, swings)
    # (suite, provider) → variance and degrees of freedom of each side of each case
    spread: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for ((suite, *_), name), pair in pairs.items():
        spread.setdefault((suite, name), []).extend(_variance(runs) for runs in pair)
    changes = []
    for (key, name), (a_runs, b_runs) in pairs.items():
        whole = spread[key[0], name]
        if not sum(freedom for _, freedom in whole):
            if name != OURS:
                continue
            raise ValueError(
                f"the suite {key[0]!r} was run once on each side, so its noise is not known: "
                "merge repeated runs of one side with python -m bench.report --keep MACHINE RUN RUN …"
            )
        variance = max(_pooled(whole), _pooled([_variance(a_runs), _variance(b_runs)]))
        noise = ERRORS * math.sqrt(variance * (1 / len(a_runs) + 1 / len(b_runs)))
        change = statistics.fmean(b_runs) - statistics.fmean(a_runs)
        changes.append(Change(key, name, math.expm1(change), math.expm1(noise)))
    return changes


def _variance(runs: Runs) -> tuple[float, int]:
    return (statistics.variance(runs) if len(runs) > 1 else 0.0), len(runs) - 1


def _pooled(parts: Sequence[tuple[float, int]]) -> float:
    freedom = sum(n for _, n in parts)
    return sum(variance * n for variance, n in parts) / freedom if freedom else 0.0


def lines(before: Results, after: Results, changes: Sequence[Change]) -> Iterator[str]:
    """The report: ours, the largest change first; baselines that moved; what is gone."""
    yield from ("| | change of glf_fast's time | noise | |", "|---|---|---|---|")
    for c in sorted(changes, key=lambda c: c.noise - c.change):
        if c.provider == OURS:
            yield f"| {' '.join(c.key)} | {c.change:+.1%} | {c.noise:.1%} | {'slower' if c.slower else ''} |"
    if before.setting["torch"] != after.setting["torch"]:
        yield f"\ntorch {before.setting['torch']} before, {after.setting['torch']} after: baselines may have moved."
    for c in changes:
        if c.provider != OURS and c.moved:
            yield f"\n{' '.join(c.key)}: the baseline {c.provider} moved by itself, {c.change:+.1%} (noise {c.noise:.1%})."
    for key in vanished(before, after):
        yield f"\n{' '.join(key)}: glf_fast has no time any more."
    if after.wrong:
        yield from ("\nNot timed in the second file:", *after.wrong)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    before, after = read(arguments.before), read(arguments.after)
    if reason := why_not(before, after):
        sys.exit(reason)
    try:
        changes = compare(before, after)
    except ValueError as error:
        sys.exit(str(error))
    print("\n".join(lines(before, after, changes)))
    if not any(c.provider == OURS for c in changes):
        sys.exit("the files have no case of glf_fast in common")
    sys.exit(bool(vanished(before, after)) or any(c.slower for c in changes if c.provider == OURS))


if __name__ == "__main__":
    main()
