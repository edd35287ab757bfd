"""What became slower: `python -m bench.compare --before FILE FILE … --after FILE FILE …`, with repeated runs on each side.

Times are taken relative to eager PyTorch in the same run, so that a busier machine is no regression. The runs of one side
differ by noise alone; a case is slower when the sides differ by more than the larger spread within one. Exits with 1 then.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.results import Result, read

__all__ = ["compare", "main"]

Ratios = dict[str, list[float]]
OURS, BASE = "glf_fast", "eager"


def ratios(runs: Sequence[Sequence[Result]]) -> Ratios:
    """ "case mode" → our median over eager's, in each run that has both."""
    found: Ratios = {}
    for run in runs:
        times = {(r.case, r.mode, r.provider): r.median for r in run}
        for (case, mode, provider), seconds in times.items():
            if provider == OURS and (case, mode, BASE) in times:
                found.setdefault(f"{case} {mode}", []).append(seconds / times[case, mode, BASE])
    return found


def compare(before: Ratios, after: Ratios) -> list[tuple[str, float, float, bool]]:
    """(case and mode, change of our time, noise, whether it is slower) for all that both sides have; 0.1 is 10 %.

    Raises:
        ValueError: neither side repeats a case, so its noise is not known.
    """
    rows = []
    for name in sorted(before.keys() & after.keys()):
        if max(len(before[name]), len(after[name])) < 2:
            raise ValueError(f"{name} was measured once on each side: give two or more runs of one, to know the noise")
        noise = max(max(side[name]) / min(side[name]) - 1 for side in (before, after))
        change = statistics.median(after[name]) / statistics.median(before[name]) - 1
        rows.append((name, change, noise, change > noise))
    return rows


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    for side in ("before", "after"):
        parser.add_argument(f"--{side}", nargs="+", type=Path, required=True)
    arguments = parser.parse_args()
    sides = [ratios([read(path)[1] for path in paths]) for paths in (arguments.before, arguments.after)]
    try:
        rows = compare(*sides)
    except ValueError as error:
        sys.exit(str(error))
    print("| | change | noise | |\n|---|---|---|---|")
    for name, change, noise, slower in rows:
        print(f"| {name} | {change:+.0%} | {noise:.0%} | {'slower' if slower else ''} |")
    sys.exit(any(slower for *_, slower in rows))


if __name__ == "__main__":
    main()
