"""Tables and figures of result files: `python -m bench.report [FILE …] [--keep MACHINE] [--docs]`.

Files are those of bench/results, all of them by default. With `--keep MACHINE` they are fresh ones, of `pytest bench
--benchmark-json FILE` or of `make gpu`: repeated runs, or different suites, of one machine at one commit. They are merged and
put into bench/results/MACHINE/times.json, in the place of an older one. `--docs` writes each machine's page,
docs/benchmarks/MACHINE.md, its figures, the tables in docs/benchmarks.md (the goals, and processors beside GPUs), and those in
docs/drop-in.md.
A GPU's page ends with what was predicted (bench/predictions.json) beside what was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.drop_in import converted
from bench.goals import gpu_goals, processor_goals
from bench.plots import draw
from bench.predictions import predictions
from bench.results import Results, merge, read, write
from bench.tables import page, worth_a_gpu

__all__ = ["main", "with_tables"]

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "bench" / "results"
DOCS = ROOT / "docs" / "benchmarks"
OVERVIEW = ROOT / "docs" / "benchmarks.md"
DROP_IN = ROOT / "docs" / "drop-in.md"
# Marked parts of pages, and what makes their lines.
PARTS = {
    "goals": processor_goals,
    "goals of GPUs": gpu_goals,
    "worth a GPU": worth_a_gpu,
    "converted flows": converted,
}


def with_tables(text: str, machines: Sequence[Results]) -> str:
    """A page with the tables between its marks made anew."""
    for name, make in PARTS.items():
        begin, end = f"<!-- begin: python -m bench.report --docs: {name} -->", "<!-- end -->"
        if begin not in text:
            continue
        before, rest = text.split(begin)
        lines = "\n".join(make(machines)).strip()
        text = f"{before}{begin}\n\n{lines}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def kept_of(paths: Sequence[Path]) -> Results:
    """What is kept of these runs.

    Raises:
        ValueError: they cannot be merged, or one only saw that everything runs.
    """
    files = [read(path) for path in paths]
    for path, found in zip(paths, files, strict=True):
        if found.machine.get("quick"):
            raise ValueError(f"{path} is of a run with --quick or --rehearse, whose times mean nothing")
    return merge(files)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--keep", metavar="MACHINE", default="")
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    if arguments.keep:
        if not arguments.files:
            parser.error("--keep needs the files to keep")
        kept = FOLDER / arguments.keep / "times.json"
        try:
            write(kept_of(arguments.files), kept)
        except ValueError as error:
            sys.exit(str(error))
        arguments.files = [kept]
    for path in arguments.files or sorted(FOLDER.glob("*/times.json")):
        found = read(path)
        text = "\n".join([*page(found), *predictions(found)]) + "\n"
        if not arguments.docs:
            print("\n".join([text, "## Goals", "", *gpu_goals([found])]) if found.machine.get("gpu") else text)
            continue
        machine = path.parent.name
        figures = draw(found, DOCS / machine)
        images = "".join(f"\n![{figure.stem}]({figure.relative_to(DOCS)})\n" for figure in figures)
        (DOCS / f"{machine}.md").write_text(text + images)
        print(DOCS / f"{machine}.md")
    if arguments.docs:
        machines = [read(path) for path in sorted(FOLDER.glob("*/times.json"))]
        for path in (OVERVIEW, DROP_IN):
            path.write_text(with_tables(path.read_text(), machines))
            print(path)


if __name__ == "__main__":
    main()
