"""Commands in a folder of their own, with a cache below it and no network; and verdicts on their results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.faults import children, verdicts
from tests.faults.children import Ended
from tests.faults.verdicts import RIGHT, Outcome, Verdict


def run(module: Any, *arguments: object, place: Path, before: Callable[[], None] | None = None) -> Ended:
    """Run a command in a folder, with a cache of its own below it, in which no network answers."""

    def prepare() -> None:
        os.chdir(place)
        os.environ.update(environment(place))
        if before:
            before()

    return children.run(module, *arguments, before=prepare)


def environment(place: Path) -> Mapping[str, str]:
    """The environment of a command that runs in a folder."""
    nowhere = "http://127.0.0.1:9"
    return {"GLF_FAST_CACHE": str(place / "cache"), "http_proxy": nowhere, "https_proxy": nowhere, "no_proxy": ""}


def judge(ended: Ended, *, equal: bool = True, named: str = "") -> tuple[Verdict, str]:
    """The verdict on how a command ended, and what was printed where that is not right.

    Args:
        equal: whether the result is the right one, if there is a result.
        named: what a line that refuses must name.
    """
    verdict = verdicts.judge(ended)
    clean = all(c.isprintable() or c == "\n" for c in ended.out + ended.err) and "Warning: " not in ended.err
    if verdict in RIGHT and not clean:
        verdict = Verdict.UNCLEAR
    elif verdict is Verdict.SURVIVED and not equal:
        verdict = Verdict.UNEQUAL
    elif verdict is Verdict.REFUSED and not (named in ended.error_lines[-1] and len(ended.error_lines[-1]) < 2000):
        verdict = Verdict.UNCLEAR
    if verdict in RIGHT:
        return verdict, ""
    return verdict, f"status {ended.status}, {ended.seconds:.1f} s: {ended.err[-1500:]!r} {ended.out[-300:]!r}"


def outcomes(campaign: str, count: int, seed: int, one: Callable[[int], tuple[str, Verdict, str]]) -> Iterator[Outcome]:
    """An outcome for each number: `one` gives the row of the table, the verdict and the details."""
    for number in range(count):
        row, verdict, detail = one(number)
        yield Outcome(f"{campaign}: {row}", f"{campaign}, seed {seed}, number {number}", verdict, detail)
