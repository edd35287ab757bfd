"""Signals in a training run, at file operations and at random times; then the same command again."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.faults.children import Ended
from tests.faults.injector import Fault
from tests.faults.small_run import SmallRun, small_run
from tests.faults.verdicts import Outcome, Verdict

AT_OPERATION = "training: SIGTERM, SIGINT at the n-th file operation"
AT_TIME = "training: SIGKILL, SIGTERM, SIGINT at random times"
# Exit statuses after each signal: an orderly stop, and, outside of training itself, the signal's own effect.
_ENDS = {
    signal.SIGTERM: (0, 128 + signal.SIGTERM, -signal.SIGTERM),
    signal.SIGINT: (0, 128 + signal.SIGINT),
    signal.SIGKILL: (0, -signal.SIGKILL),
}


def campaign(seed: int, count: int, folder: Path) -> Iterator[Outcome]:
    """Send `count` signals, every second one at a file operation."""
    run, chance = small_run(folder.parent), random.Random(f"signals {seed}")
    for i in range(count):
        place = folder / str(i)
        place.mkdir(parents=True)
        if i % 2:
            number = (signal.SIGTERM, signal.SIGINT)[i // 2 % 2]
            fault = Fault(chance.randrange(1, run.operations + 1), "signal", number)
            ended, what = run.start(place, fault).ended, str(fault)
            yield Outcome(AT_OPERATION, what, *_verdict(run, place, ended, number))
        else:
            number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i // 2 % 3]
            seconds = chance.uniform(0, 1.1 * run.seconds)
            ended, what = run.interrupt(place, seconds, number), f"{number.name} after {seconds:.3f} s"
            yield Outcome(AT_TIME, what, *_verdict(run, place, ended, number))
        shutil.rmtree(place)


def _verdict(run: SmallRun, place: Path, ended: Ended, number: signal.Signals) -> tuple[Verdict, str]:
    if ended.hung:
        return Verdict.HUNG, ended.err
    if "Traceback" in ended.err:
        return Verdict.TRACEBACK, ended.err
    if ended.status not in _ENDS[number]:
        return Verdict.UNCLEAR, f"status {ended.status}: {ended.err}"
    # A run that is stopped before its first pictures draws some, which the undisturbed run does not have.
    names = {path.relative_to(run.whole) for path in run.whole.rglob("*.png")}
    for path in place.rglob("[!.]*.png"):
        if path.relative_to(place) not in names:
            path.unlink()
    return run.finish(place)
