"""Tables and figures of result files: `python -m bench.report [FILE …] [--keep MACHINE] [--docs]`.

Files are those of bench/results, all of them by default. With `--keep MACHINE` they are fresh ones, of `pytest bench
--benchmark-json FILE` or of `make gpu`: repeated runs, or different suites, of one machine at one commit. They are merged and
put into bench/results/MACHINE/times.json, in the place of an older one. `--docs` writes each machine's page,
docs/benchmarks/MACHINE.md, its figures, and the table in docs/benchmarks.md that sets processors beside GPUs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.plots import draw
from bench.results import Results, merge, read, write
from bench.tables import page, worth_a_gpu

__all__ = ["main", "with_table"]

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "bench" / "results"
DOCS = ROOT / "docs" / "benchmarks"
OVERVIEW = ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- begin: python -m bench.report --docs -->", "<!-- end -->")


def with_table(text: str, machines: Sequence[Results]) -> str:
    """docs/benchmarks.md with the table between its marks made anew."""
    table = "\n".join(worth_a_gpu(machines))
    pattern = re.compile(f"({re.escape(MARKS[0])}\n).*?({re.escape(MARKS[1])})", flags=re.S)
    return pattern.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


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
            write(merge([read(path) for path in arguments.files]), kept)
        except ValueError as error:
            sys.exit(str(error))
        arguments.files = [kept]
    for path in arguments.files or sorted(FOLDER.glob("*/times.json")):
        found = read(path)
        text = "\n".join(page(found)) + "\n"
        if not arguments.docs:
            print(text)
            continue
        machine = path.parent.name
        figures = draw(found, DOCS / machine)
        images = "".join(f"\n![{figure.stem}]({figure.relative_to(DOCS)})\n" for figure in figures)
        (DOCS / f"{machine}.md").write_text(text + images)
        print(DOCS / f"{machine}.md")
    if arguments.docs:
        OVERVIEW.write_text(
            with_table(OVERVIEW.read_text(), [read(path) for path in sorted(FOLDER.glob("*/times.json"))])
        )
        print(OVERVIEW)


if __name__ == "__main__":
    main()
