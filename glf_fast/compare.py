"""python -m glf_fast.compare [--models NAME …] [--data NAME]: train several models alike, and compare them in one table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from glf_fast import data, distributed, metrics
from glf_fast.command_line import parse, pick_device
from glf_fast.errors import UserError, check_text, run_command
from glf_fast.training import comparison, comparison_page
from glf_fast.training.comparison_plan import Plan, rows
from glf_fast.training.splits import load_splits


@dataclass(frozen=True)
class Command:
    """Compare models: train each with the same data, networks, budget and scores, then write a table and a page.

    Running the same command again resumes the comparison. Other rows may be added to the same folder later.
    """

    models: str = ""
    """Rows of the table, separated by commas; by default all for this kind of data. A wrong name lists the rows."""
    data: str = "fashion-mnist"
    """The data set: a public data set's name (python -m glf_fast.data list), or a path."""
    epochs: int | None = None
    """Passes over the training data; by default the number of the size."""
    seeds: int = 1
    """Number of runs of each row, with seeds 0, 1, …; the table has mean and standard deviation of several."""
    size: str = "quick"
    """Networks and budget: quick (minutes a row on two processor cores), paper (as in arXiv:1905.10485) or smoke (seconds)."""
    scores: str = ""
    """Scores in the table, separated by commas: fd, kid, pr, is, prd, dc, msssim, critic, modes, nearest (docs/scores.md); by
    default those of the size. Finished runs are given the scores that they lack."""
    out: Path | None = None
    """Folder of the comparison; by default comparisons/ and a name made from data, size and epochs."""
    data_dir: Path | None = None
    """Folder in which to look for the data set first."""
    device: str = ""
    """Device: cpu, cuda, cuda:1, …; by default cuda if there is a GPU."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take two steps of each row and print the plan with estimated times, without writing anything."""


def main() -> None:
    """Run the command."""
    with distributed.launched():
        _compare()


def _compare() -> None:
    command = parse(Command, sys.argv[1:], "glf_fast.compare")
    names = tuple(dict.fromkeys(name.strip() for name in command.models.split(",") if name.strip())) or rows(
        data.expected_kind(command.data)
    )
    scores = metrics.named_scores(command.scores)
    plan = Plan(names, command.data, command.size, command.epochs, command.seeds, command.out, scores)
    if scores and plan.kind == "tokens":
        raise UserError("--scores is for images, and this comparison is of sequences; leave it out")
    check_text("--out", str(plan.folder))
    device = pick_device(command.device)
    train, test = load_splits(plan.shared.data, command.data_dir)
    if plan.kind != "tokens" or train.kind != "tokens":
        train, test = data.as_images(train), data.as_images(test)
    if command.dry_run:
        comparison.dry_run(plan, train, device)
        return
    record = comparison.run(plan, train, test, device)
    print(distributed.by_main((plan.folder / comparison_page.MARKDOWN).read_text)(encoding="utf-8"))
    print(f"page      {plan.folder / comparison_page.HTML}\nresults   {plan.folder / comparison_page.JSON}")
    failed = {
        (row["name"], run["seed"]) for row in record["rows"] for run in row["runs"] if run["state"] == "failed"
    }.intersection(plan.wanted)
    if failed:
        listed = ", ".join(sorted({row for row, _ in failed}))
        raise UserError(f"{len(failed)} of {len(plan.wanted)} runs failed ({listed}); the table has the reasons")


if __name__ == "__main__":
    run_command(main)
