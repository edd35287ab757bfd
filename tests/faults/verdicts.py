"""Verdicts on faults, counted: the figures of docs/reliability.md."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch
    from tests.faults.children import Ended


class Verdict(enum.Enum):
    """The end of a command that met a fault. Only the first two are right."""

    SURVIVED = "survived"  # the result is that of a command that met no fault
    REFUSED = "refused in one line"  # nothing else was written, and the line says what to do
    UNEQUAL = "unequal"  # the result differs, and nobody said so
    STUCK = "stuck"  # the same command does not go on
    TRACEBACK = "traceback"
    UNCLEAR = "unclear"  # several lines, no reason, or raw control characters
    LEFTOVER = "leftover"  # files that nothing removes
    HUNG = "hung"


RIGHT = (Verdict.SURVIVED, Verdict.REFUSED)


def judge(ended: Ended) -> Verdict:
    """The verdict on a command's end alone: whether its output is right is the campaign's to say.

    A refusal is exit status 2 and exactly one line that begins with "error: ", the last one. Notices may precede it.
    """
    if ended.hung:
        return Verdict.HUNG
    if ended.status < 0 or "Traceback (most recent call last)" in ended.err or "Exception ignored" in ended.err:
        return Verdict.TRACEBACK
    if ended.status == 0:
        return Verdict.SURVIVED
    errors = [line for line in ended.error_lines if line.startswith("error: ")]
    clear = errors == ended.error_lines[-1:] and all(map(str.isprintable, ended.error_lines)) and len(errors[0]) > 15
    return Verdict.REFUSED if ended.status == 2 and clear else Verdict.UNCLEAR


@dataclass(frozen=True)
class Outcome:
    """One fault.

    Attributes:
        campaign: the row of the table, such as "kill at the n-th file operation".
        fault: what repeats this one alone: seed, number, file.
        detail: what was printed, where the verdict is not right.
    """

    campaign: str
    fault: str
    verdict: Verdict
    detail: str = ""


@dataclass
class Table:
    """Outcomes, counted by campaign."""

    counts: dict[str, Counter[Verdict]] = field(default_factory=dict)
    wrong: list[Outcome] = field(default_factory=list)

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Count these, one by one as they come."""
        for outcome in outcomes:
            self.counts.setdefault(outcome.campaign, Counter())[outcome.verdict] += 1
            if outcome.verdict not in RIGHT:
                self.wrong.append(outcome)

    @property
    def total(self) -> int:
        """Number of faults."""
        return sum(count.total() for count in self.counts.values())

    def markdown(self) -> str:
        """The table: a row a campaign; a column for each right verdict, and one for all that are wrong."""
        lines = ["| fault | tried | survived | refused in one line | wrong |", "|---|---|---|---|---|"]
        for campaign, count in sorted(self.counts.items()):
            survived, refused = (count[verdict] for verdict in RIGHT)
            wrong = ", ".join(f"{n} {verdict.value}" for verdict, n in count.items() if verdict not in RIGHT) or "0"
            lines.append(f"| {campaign} | {count.total():,} | {survived:,} | {refused:,} | {wrong} |")
        return "\n".join(lines)
