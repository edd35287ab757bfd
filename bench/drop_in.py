"""The tables of docs/drop-in.md: how much faster converted flows are."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from bench.results import Results

__all__ = ["converted", "lines"]


def converted(machines: Sequence[Results]) -> Iterator[str]:
    """Tables of all machines."""
    for found in machines:
        yield from lines(found)


def lines(found: Results) -> Iterator[str]:
    """Converted flows against their originals, and NPE on two moons, on one machine; nothing where that was not measured."""
    machine = found.machine
    where = f"{machine['cpu']['brand_raw']}, {machine['cores']} cores, torch {machine['torch']}, {found.date[:10]}"
    cases = [key for key in found.groups() if key[0] == "convert"]
    if cases:
        modes = list(dict.fromkeys(mode for _, _, mode in cases))
        yield from ("", f"How many times faster than the original a converted flow is ({where}):", "")
        yield "| | " + " | ".join(modes) + " |"
        yield "|---|" + "---|" * len(modes)
        for case in dict.fromkeys(case for _, case, _ in cases):
            cells = []
            for mode in modes:
                rows = found.groups().get(("convert", case, mode))
                cells.append(f"{rows['original'].median / rows['glf_fast'].median:.1f}" if rows else "")
            yield f"| {case} | " + " | ".join(cells) + " |"
    for (suite, _, _), rows in found.groups().items():
        if suite == "two_moons":
            yield from (
                "",
                f"sbi's NPE on two moons, {rows['sbi'].info['simulations']:,} simulations, both until sbi's own stopping rule",
            )
            yield f"({where}); C2ST is 0.5 where a classifier cannot tell the posterior from the exact one:"
            yield ""
            yield "| | training | C2ST, mean and spread of the runs | runs |"
            yield "|---|---|---|---|"
            for name, row in rows.items():
                scores = row.info["c2st"]
                spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
                yield f"| {name} | {row.median:.0f} s | {statistics.mean(scores):.3f}{spread} | {len(scores)} |"
