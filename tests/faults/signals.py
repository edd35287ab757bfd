"""Signals in a training run, at file operations and at random times; then the same command again."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from glf_fast.training import checkpoint
from tests.faults.children import Ended
from tests.faults.injector import Fault
from tests.faults.small_run import SmallRun, small_run
from tests.faults.verdicts import Outcome, Verdict

AT_OPERATION = "training: SIGTERM, SIGINT at the n-th file operation"
AT_TIME = "training: SIGKILL, SIGTERM, SIGINT at random times"
# Exit statuses after each signal: an orderly stop, or, before and after training itself, the signal's own effect.
_ENDS = {
    signal.SIGTERM: (128 + signal.SIGTERM, -signal.SIGTERM),
    signal.SIGINT: (128 + signal.SIGINT,),
    signal.SIGKILL: (-signal.SIGKILL,),
}


def campaign(seed: int, count: int, folder: Path) -> Iterator[Outcome]:
    """Send `count` signals, every second one at a file operation."""
    run, chance = small_run(folder.parent, "glf"), random.Random(f"signals {seed}")
    for i in range(count):
        place = folder / str(i)
        place.mkdir(parents=True)
        if i % 2:
            number = (signal.SIGTERM, signal.SIGINT)[i // 2 % 2]
            fault = Fault(chance.randrange(1, run.operations + 1), "signal", number)
            met = run.start(place, fault)
            yield Outcome(
                AT_OPERATION, f"{fault} ({met.where})", *_verdict(run, place, met.ended, number, not met.where)
            )
        else:
            number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i // 2 % 3]
            seconds = chance.uniform(0, 1.1 * run.seconds)
            ended, what = run.interrupt(place, seconds, number), f"{number.name} after {seconds:.3f} s"
            # A process that computes its final scores may end before the signal arrives.
            late = ended.before is None or "computing the final scores" in ended.before
            yield Outcome(AT_TIME, what, *_verdict(run, place, ended, number, late))
        shutil.rmtree(place)


def _verdict(run: SmallRun, place: Path, ended: Ended, number: signal.Signals, late: bool) -> tuple[Verdict, str]:
    """The verdict on the signal, and on the same command afterwards.

    Args:
        late: whether the command may have ended before the signal came; otherwise it must not go on as if there were none.
    """
    if ended.hung:
        return Verdict.HUNG, ended.err
    if "Traceback" in ended.err:
        return Verdict.TRACEBACK, ended.err
    if ended.status not in _ENDS[number] and not (late and ended.status == 0):
        return Verdict.UNCLEAR, f"status {ended.status}: {ended.err}"
    if number is not signal.SIGKILL and ended.status and _training(run, place):
        last = place / "run" / "checkpoints" / "last"
        if ended.status != 128 + number or "stopped after" not in ended.err or not checkpoint.exists(last):
            return Verdict.UNCLEAR, f"no orderly stop, status {ended.status}: {ended.err}"
    # A run that is stopped before its first pictures draws some, which the undisturbed run does not have.
    names = {path.relative_to(run.whole) for path in run.whole.rglob("*.png")}
    for path in place.rglob("[!.]*.png"):
        if path.relative_to(place) not in names:
            path.unlink()
    return run.finish(place)


def _training(run: SmallRun, place: Path) -> bool:
    """Whether a run has ended within training: its first step is in the log, and its last one is in no checkpoint."""
    last = Path("run", "checkpoints", "last")
    if not (place / "run" / "metrics.jsonl").is_file():
        return False
    if not checkpoint.exists(place / last):
        return True
    return bool(checkpoint.read_state(place / last)["images"] < checkpoint.read_state(run.whole / last)["images"])
