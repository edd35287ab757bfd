"""What became of each fault, counted: the figures of docs/reliability.md."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


class Verdict(enum.Enum):
    """What a command made of a fault. Only the first two are right."""

    SURVIVED = "survived"  # the result is that of a command that met no fault
    REFUSED = "refused in one line"  # nothing else was written, and the line says what to do
    UNEQUAL = "unequal"  # the result differs, and nobody said so
    STUCK = "stuck"  # the same command does not go on
    TRACEBACK = "traceback"
    UNCLEAR = "unclear"  # several lines, no reason, or raw control characters
    LEFTOVER = "leftover"  # files that nothing removes
    HUNG = "hung"


RIGHT = (Verdict.SURVIVED, Verdict.REFUSED)


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

    def markdown(self) -> str:
        """The table: a row a campaign; a column for each right verdict, and one for all that are wrong."""
        lines = ["| fault | tried | survived | refused in one line | wrong |", "|---|---|---|---|---|"]
        for campaign, count in self.counts.items():
            survived, refused = (count[verdict] for verdict in RIGHT)
            wrong = ", ".join(f"{n} {verdict.value}" for verdict, n in count.items() if verdict not in RIGHT) or "0"
            lines.append(f"| {campaign} | {count.total():,} | {survived:,} | {refused:,} | {wrong} |")
        return "\n".join(lines)
