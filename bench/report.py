"""Tables of result files: `python -m bench.report [FILE …] [--keep MACHINE] [--docs]`.

Files are those of bench/results, all of them by default, or with `--keep MACHINE` fresh ones of `pytest bench
--benchmark-json FILE`: these are trimmed and put into bench/results/MACHINE/, in the place of older ones. `--docs` writes
each machine's tables to docs/benchmarks/MACHINE.md, and figures beside them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.plots import draw
from bench.results import Result, read, trim

__all__ = ["main", "tables"]

FOLDER = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
OURS = "glf_fast"


def tables(machine: dict[str, Any], results: Sequence[Result]) -> Iterator[str]:
    """The lines of a Markdown page: the machine, and a table a case and mode, the fastest provider first."""
    versions = f"torch {machine['torch']}, Python {machine['python_version']}, commit {machine['commit']}"
    yield f"# {machine.get('gpu') or machine['cpu']['brand_raw']}, {machine['cores']} cores; {versions}; {machine['date'][:10]}"
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.case, result.mode), []).append(result)
    for (case, mode), rows in groups.items():
        ours = next(row for row in rows if row.provider == OURS)
        yield ""
        if "peak_bytes" in ours.info:
            yield f"## {case}: peak extra memory of {mode} (batch {ours.info['batch']})"
            yield ""
            yield "| | MiB | × glf_fast | time |"
            yield "|---|---|---|---|"
            for row in sorted(rows, key=lambda row: row.info["peak_bytes"]):
                peak = row.info["peak_bytes"]
                yield f"| {row.provider} | {peak / 2**20:.0f} | {peak / ours.info['peak_bytes']:.2f} | {_time(row.median)} |"
            continue
        yield f"## {case}, {mode} (batch {ours.info['batch']}, {ours.info['threads']} threads)"
        yield ""
        yield (
            f"The matrix products alone at the rate of torch's own ({ours.info['matrix_gflops']:.0f} GFLOP/s), or reading the "
            f"weights: {_time(ours.info['floor_s'])}."
        )
        yield ""
        yield "| | median | quartiles | × glf_fast | GFLOP/s | of torch's matrix rate |"
        yield "|---|---|---|---|---|---|"
        for row in sorted(rows, key=lambda row: row.median):
            stats, info = row.stats, row.info
            yield (
                f"| {row.provider} | {_time(row.median)} | {_time(stats['q1'])} – {_time(stats['q3'])} "
                f"| {row.median / ours.median:.2f} | {info['gflops']:.0f} | {info['share_of_matrix_rate']:.0%} |"
            )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--keep", metavar="MACHINE", default="")
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    for path in arguments.files or sorted(FOLDER.glob("*/flow.json")):
        if arguments.keep:
            trimmed = trim(path)
            kept = FOLDER / arguments.keep / path.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(trimmed, indent=1) + "\n")
            path = kept
        machine, results = read(path)
        text = "\n".join(tables(machine, results)) + "\n"
        if arguments.docs:
            page = DOCS / f"{path.parent.name}.md"
            figures = draw(machine, results, DOCS / path.parent.name)
            page.write_text("\n".join([text, *(f"![]({figure.relative_to(DOCS)})\n" for figure in figures)]))
            print(page)
        else:
            print(text)


if __name__ == "__main__":
    main()
