"""kill -9 at file operations of a training run, several in a row; then the same command again."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.faults.injector import KILLS, Fault
from tests.faults.small_run import age, small_run
from tests.faults.verdicts import Outcome, Verdict, judge

NAME = "training: kill -9 at the n-th file operation"
# Kills in a row before the run is left alone.
_LONGEST = 6
# What consecutive shares train: most write a checkpoint after each step, so that each operation can be met again.
_RUNS = ("glf", "staged", "glf", "staged", "seldom")


def campaign(seed: int, count: int, folder: Path) -> Iterator[Outcome]:
    """Kill `count` times. The shares of one kind of run go through all operations before any of them comes again."""
    turn, position = divmod(seed, len(_RUNS))
    model = _RUNS[position]
    earlier = turn * _RUNS.count(model) + _RUNS[:position].count(model)  # shares of the same kind of run
    run = small_run(folder.parent, model)
    chance = random.Random(f"kills {seed}")
    places = [(at, how) for at in range(1, run.operations + 1) for how in KILLS]
    random.Random(0).shuffle(places)
    killed = drawn = 0
    while killed < count:
        place, faults, wrong = folder / str(killed), [], None
        place.mkdir(parents=True)
        while len(faults) < _LONGEST and wrong is None:
            at, how = places[(earlier * count + drawn) % len(places)]
            if faults and chance.random() < 0.3:
                at = chance.randrange(1, 60)  # resuming itself
            else:
                drawn += 1
            age(place)
            met = run.start(place, Fault(at, how))
            if not met.where:
                wrong = None if judge(met.ended) is Verdict.SURVIVED else (judge(met.ended), met.ended.err)
                break
            faults.append(f"{how} {at} ({met.where})")
        if not faults:
            shutil.rmtree(place)
            continue
        verdict, detail = wrong or run.finish(place)
        if verdict is Verdict.REFUSED:
            verdict = Verdict.STUCK
        for i in range(len(faults)):
            last = i == len(faults) - 1
            yield Outcome(NAME, "; ".join(faults[: i + 1]), verdict if last else Verdict.SURVIVED, detail * last)
        killed += len(faults)
        shutil.rmtree(place)
