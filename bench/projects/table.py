"""The table of projects in docs/drop-in.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.projects import PROJECTS, Project
from bench.results import Results

__all__ = ["lines", "with_table"]

BEGIN, END = "<!-- begin: python -m bench.projects --docs -->", "<!-- end -->"


def with_table(text: str, files: Sequence[Results]) -> str:
    """A page with the table between its marks made anew.

    Raises:
        ValueError: the page has no marks.
    """
    if BEGIN not in text:
        raise ValueError(f"the page has no line {BEGIN}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n" + "\n".join(lines(files)).strip() + f"\n\n{END}{rest.split(END, 1)[1]}"


def lines(files: Sequence[Results]) -> Iterator[str]:
    """One table for each machine; without any, one without times."""
    replaced = [project for project in PROJECTS.values() if not project.why or project.how]
    yield f"{len(replaced)} of these {len(PROJECTS)} flows are replaced, in whole or in part."
    tables: list[Results | None] = [*files] or [None]
    for found in tables:
        if found is not None:
            yield ""
            yield (
                f"How many times faster than the original, at the project's sizes and batch ({found.where}, "
                f"{found.machine['threads']} threads, torch {found.machine['torch']}, {found.date[:10]}):"
            )
        yield ""
        yield "| project | flow | step | step, fused Adam | log p | sample | how |"
        yield "|---|---|---|---|---|---|---|"
        for project in PROJECTS.values():
            yield _row(project, found)


def _row(project: Project, found: Results | None) -> str:
    cells = []
    for mode in ("step", "fused step", "log_prob", "sample"):
        pair = {} if found is None else found.groups().get(("projects", project.name, mode), {})
        both = len(pair) == 2
        cells.append(f"{pair['original'].median / pair['glf_fast'].median:.1f}" if both else "")
    how = project.how or (f"stays: {project.why}" if project.why else "`accelerate`")
    return f"| {project.name} | {project.library}: {project.about} | {' | '.join(cells)} | {how} |"
