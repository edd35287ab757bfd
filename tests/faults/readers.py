"""Readers beside a writer: `checkpoint.read` while another process replaces the checkpoint, and `sample` beside training.

A reader must find one of the writer's checkpoints as a whole. A mixture of two is UNEQUAL; an intact checkpoint that is called
corrupt or missing is UNCLEAR.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from glf_fast import sample
from glf_fast.errors import UserError
from glf_fast.training import checkpoint
from glf_fast.training.checkpoint import Checkpoint
from tests.faults import children
from tests.faults.injector import Fault
from tests.faults.small_run import SmallRun, small_run, with_cache
from tests.faults.verdicts import Outcome, Verdict, judge

READ = "checkpoint.read beside checkpoint.write"
SAMPLE = "sample beside training"


def campaign(seed: int, count: int, folder: Path) -> Iterator[Outcome]:
    """Read `count` times, every tenth time by `sample`."""
    folder.mkdir(parents=True)
    samples = count // 10
    yield from _reads(folder / "checkpoint", count - samples, seed)
    yield from _samples(small_run(folder.parent, "glf"), folder, samples, seed)


# -- checkpoint.read ------------------------------------------------------------------------------------------------------


def _numbered(number: int) -> Checkpoint:
    """A checkpoint all of whose parts hold its number."""
    weights, training = ({name: torch.full((64, 64), float(number))} for name in ("weights", "optimizer"))
    return Checkpoint("glf", {"number": number}, weights, training, {"images": number})


def _numbers(found: Checkpoint) -> set[float]:
    values = [found.config["number"], found.state["images"]]
    for tensor in (*found.weights.values(), *found.training.values()):
        values += [tensor.min().item(), tensor.max().item()]
    return set(map(float, values))


def _reads(folder: Path, count: int, seed: int) -> Iterator[Outcome]:
    def write() -> None:
        number = 1
        while True:
            number += 1
            checkpoint.write(folder, _numbered(number))

    checkpoint.write(folder, _numbered(1))
    with _beside(write):
        for i in range(count):
            verdict, detail = Verdict.SURVIVED, ""
            try:
                numbers = _numbers(checkpoint.read(folder, training=True))
                if len(numbers) != 1:
                    verdict, detail = Verdict.UNEQUAL, f"parts of the checkpoints {sorted(numbers)}"
            except UserError as error:
                verdict, detail = Verdict.UNCLEAR, str(error)
            except Exception:
                verdict, detail = Verdict.TRACEBACK, traceback.format_exc()
            yield Outcome(READ, f"seed {seed}, read {i}", verdict, detail)


# -- sample ---------------------------------------------------------------------------------------------------------------


def _samples(run: SmallRun, folder: Path, count: int, seed: int) -> Iterator[Outcome]:
    place = folder / "trained"

    def train() -> None:
        for k in itertools.count():
            run.start(place / str(k), Fault())

    (place / "0").mkdir(parents=True)
    with _beside(train):
        for i in range(count):
            which = ("last", "best")[i % 2]
            arguments = [_newest(place, which) / "run", "--n", "4", "--out", folder / f"{i}.png", "--checkpoint", which]
            ended = children.run(sample, *arguments, before=with_cache(folder / "cache"))
            verdict = judge(ended)
            if verdict is Verdict.REFUSED:  # an intact checkpoint
                verdict = Verdict.UNCLEAR
            yield Outcome(SAMPLE, f"seed {seed}, sample {i} of {which}", verdict, ended.err)


def _newest(place: Path, which: str) -> Path:
    """The newest run with a checkpoint, which is probably being replaced; raises TimeoutError if there is none for a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [path for path in place.iterdir() if checkpoint.exists(path / "run" / "checkpoints" / which)]
        if found:
            return max(found, key=lambda path: int(path.name))
        time.sleep(0.01)
    raise TimeoutError(f"no run in {place} has written its checkpoint {which}")


@contextlib.contextmanager
def _beside(endless: Callable[[], None]) -> Iterator[None]:
    """Run a function in another process meanwhile; raises RuntimeError if it has ended by itself."""
    process = os.fork()
    if not process:
        try:
            children.die_with_parent()
            endless()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError("the writer beside the readers has ended by itself; see above")
