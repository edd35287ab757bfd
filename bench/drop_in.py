"""The measured table of docs/drop-in.md: `python -m bench.drop_in` writes it from bench/results/*/times.json."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from bench.results import Results, read

__all__ = ["lines", "main"]

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "drop-in.md"
MARKS = ("<!-- begin: python -m bench.drop_in -->", "<!-- end -->")


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


def main() -> None:
    """See the module's docstring."""
    machines = [read(path) for path in sorted((ROOT / "bench" / "results").glob("*/times.json"))]
    table = "\n".join(line for machine in machines for line in lines(machine)) or "\nNot measured yet."
    pattern = re.compile(f"({re.escape(MARKS[0])}\n).*?({re.escape(MARKS[1])})", flags=re.S)
    PAGE.write_text(pattern.sub(lambda found: f"{found[1]}{table}\n\n{found[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
