"""The smallest training run that passes through every writer of a run, and what must be equal between two of them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from glf_fast import models, train
from glf_fast.metrics import tiny
from glf_fast.training import report
from tests.common.toy_models import Staged
from tests.faults import children, injector
from tests.faults.injector import Fault, Met
from tests.faults.verdicts import Verdict, judge

# Three steps an epoch and a checkpoint after each. "glf": pictures and a score after the second epoch, both again at the end.
# "staged": a model of the tests that trains in two stages; its averaged weights are scored.
# "seldom": the same as "glf", but some steps (of about 10 ms) pass without a checkpoint.
SETTINGS = {
    "glf": """
        --preset smoke --epochs 3 --pictures-every 2 --score.every 2
        --model.latent-dim 4 --model.width 4 --model.hidden 8 --flow.steps 2 --flow.hidden 8
    """,
    "staged": """
        --model.name staged --epochs 2 --model.density joint --model.density-epochs 2 --ema 0.9
        --pictures-every 1 --score.every 1 --score.extractors tiny
    """,
}
SETTINGS["seldom"] = SETTINGS["glf"]
_MINUTES = {"glf": "0", "staged": "0", "seldom": "0.0005"}
_COMMON = "--batch-size 13 --score.samples 4"


models._MODELS["staged"] = Staged
# Drawing curves takes two thirds of the run's time and writes nothing; the numbers that would be drawn stand for them.
report._curves = lambda records, words: str([{k: v for k, v in r.items() if k != "images_per_second"} for r in records])
# Likewise features: pixels do.
tiny.TinyNet.pooled = lambda self, x: x.flatten(1)[:, : self.dim]


class SmallRun:
    """The run's data, and an undisturbed run with its number of file operations.

    Every run lives in a folder PLACE of its own: the run in PLACE/run, its cache in PLACE/cache.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.exact = folder, model != "seldom"
        self.settings = [*SETTINGS[model].split(), *_COMMON.split(), "--checkpoint-minutes", _MINUTES[model]]
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (52, 8, 8), np.uint8)
        np.savez(folder / "data.npz", train=pixels[:40], test=pixels[40:])
        self.whole = folder / "whole"
        met = self.start(self.whole, Fault())
        assert judge(met.ended) is Verdict.SURVIVED and not left_over(self.whole), met
        self.operations, self.seconds = met.operations, met.ended.seconds

    def command(self, place: Path) -> list[object]:
        """The arguments of `train`."""
        return [*self.settings, "--data.source", self.folder / "data.npz", "--out", place / "run"]

    def start(self, place: Path, fault: Fault) -> Met:
        """Run the command, or run it again, with this fault below `place`."""
        return injector.meet(fault, place, train, *self.command(place), before=with_cache(place / "cache"))

    def interrupt(self, place: Path, seconds: float, number: int) -> children.Ended:
        """Run the command, and send it a signal after so many seconds."""
        before = with_cache(place / "cache")
        return children.run(train, *self.command(place), before=before, interrupt=(seconds, number))

    def finish(self, place: Path) -> tuple[Verdict, str]:
        """Run the command once more, undisturbed, and compare with the run that nobody disturbed."""
        age(place)
        ended = self.start(place, Fault()).ended
        verdict = judge(ended)
        if verdict is not Verdict.SURVIVED:
            return (Verdict.STUCK if verdict is Verdict.REFUSED else verdict), ended.err
        return self.compare(place)

    def compare(self, place: Path) -> tuple[Verdict, str]:
        """Whether a finished run is equal to the undisturbed one, and leaves nothing behind."""
        if differing := different(*(contents(root / "run", self.exact) for root in (self.whole, place))):
            return Verdict.UNEQUAL, ", ".join(differing)
        caches = [contents(root / "cache") for root in (self.whole, place)]
        # Statistics that could not be cached are computed again, with a notice.
        if differing := [name for name, value in caches[1].items() if caches[0].get(name) != value]:
            return Verdict.UNEQUAL, ", ".join(differing)
        if left := left_over(place):
            return Verdict.LEFTOVER, ", ".join(left)
        return Verdict.SURVIVED, ""


@functools.cache
def small_run(folder: Path, model: str) -> SmallRun:
    """The small run of this process with a model, below a folder that campaigns share."""
    return SmallRun(folder / f"{model}-{os.getpid()}", model)


def with_cache(cache: Path) -> Callable[[], None]:
    """Sets the cache folder, in a child."""
    return lambda: os.environ.update(GLF_FAST_CACHE=str(cache))


def contents(run: Path, exact: bool = True) -> dict[str, object]:
    """All files of a folder by their names, without what depends on the time.

    This is: the images per second of the log, the minutes in a checkpoint's state (and so the checksum of both), and
    TensorBoard's log, of which each process writes its own file. Hidden files are no content. If not `exact`, the time also
    chooses the steps with a checkpoint, and so with a record of losses: of the log, only scores and the end are compared, and
    the report is not.
    """
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if path.is_dir() or name.parts[0] == "tensorboard" or any(part.startswith(".") for part in name.parts):
            continue
        if path.name == "report.html" and not exact:
            continue
        if path.name == "metrics.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            records = [r for r in records if exact or r.keys() & {"score", "finished"}]
            found[str(name)] = [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]
        elif path.name == "checkpoint.json":
            index = json.loads(path.read_text())
            assert index["state"].pop("minutes") >= 0
            del index["sha256"]
            found[str(name)] = index
        else:
            found[str(name)] = path.read_bytes()
    return found


def different(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """The names of files that differ or that only one side has."""
    names = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return [f"{name}{'' if name in a else ' (too much)'}{'' if name in b else ' (missing)'}" for name in names]


def left_over(place: Path) -> list[str]:
    """Hidden files and folders below a place, but for the run's lock."""
    hidden = (path for path in place.rglob(".*") if path.name != ".lock")
    return sorted(str(path.relative_to(place)) for path in hidden)


def age(place: Path) -> None:
    """Make hidden files old: younger ones may belong to a process that is alive, and stay."""
    for path in place.rglob(".*"):
        os.utime(path, (0, 0), follow_symlinks=False)
