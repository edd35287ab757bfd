"""Kills in everything that writes files outside of training, and two processes that fill one empty cache."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from glf_fast import evaluate, sample
from glf_fast.data.fetch import Unavailable
from glf_fast.data.routes import File, Mirror
from glf_fast.data.source import Source
from glf_fast.errors import UserError
from glf_fast.files import sha256
from glf_fast.metrics import __main__ as metrics
from glf_fast.metrics.stats import FeatureStats
from glf_fast.models import GLF
from tests.faults import children, injector
from tests.faults.injector import KILLS, Fault
from tests.faults.small_run import SmallRun, age, left_over, small_run, with_cache
from tests.faults.verdicts import Outcome, Verdict, judge

TOGETHER = "two processes fill one empty cache"
_NONE = Fault()


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Attributes:
        row: its row of the table.
        prepare: puts what is there before the command into a folder.
        module, arguments: the command, given the folder.
        read: what a reader finds in the folder, as text; raises UserError if the reader refuses in a line.
        may_refuse: whether a reader may do so after a kill.
        once: whether the command refuses to write once more what is there already.
    """

    row: str
    prepare: Callable[[Path], None]
    module: Any
    arguments: Callable[[Path], list[object]]
    read: Callable[[Path], str]
    may_refuse: bool = False
    once: bool = False

    def start(self, place: Path, fault: Fault = _NONE) -> injector.Met:
        """Run the command on a folder."""
        arguments, before = self.arguments(place), with_cache(place / "cache")
        return injector.meet(fault, place, self.module(place), *arguments, before=before)


def campaign(seed: int, count: int, folder: Path) -> Iterator[Outcome]:
    """Kill `count` writers, one after the other; every tenth time two of them fill one cache instead."""
    run, chance = small_run(folder.parent, "glf"), random.Random(f"writers {seed}")
    folder.mkdir(parents=True)
    with _served(folder / "served") as url:
        writers = [
            _saving(), _evaluating(run), _sampling(run), _sampling_folder(run), _reference(run),
            _fetching(url, folder / "served"),
        ]  # fmt: skip
        whole = {writer.row: _undisturbed(writer, folder / f"whole-{i}") for i, writer in enumerate(writers)}
        for i in range(count):
            place = folder / str(i)
            if i % 10 == 9:
                writer = (writers[1], writers[-1])[i // 10 % 2]
                yield _together(writer, place, chance, whole[writer.row][2])
            else:
                writer = writers[i % len(writers)]
                operations, old, new = whole[writer.row]
                yield _killed(
                    writer, place, Fault(chance.randrange(1, operations + 1), chance.choice(KILLS)), (old, new)
                )
            shutil.rmtree(place)


def _undisturbed(writer: Writer, place: Path) -> tuple[int, str, str]:
    """The command's number of file operations, and what a reader finds before and after it."""
    place.mkdir()
    writer.prepare(place)
    try:
        old = writer.read(place)
    except UserError:
        old = ""
    met = writer.start(place)
    assert judge(met.ended) is Verdict.SURVIVED and not left_over(place), met
    return met.operations, old, writer.read(place)


def _killed(writer: Writer, place: Path, fault: Fault, right: tuple[str, str]) -> Outcome:
    """A reader finds the old content or the new one, whole, or refuses in a line; the same command again writes the new one."""
    place.mkdir()
    writer.prepare(place)
    met = writer.start(place, fault)
    what = f"{fault} ({met.where})"
    try:
        found, verdict = writer.read(place), Verdict.SURVIVED
    except UserError as error:
        found, verdict = str(error), Verdict.REFUSED
    if found not in right and not (verdict is Verdict.REFUSED and writer.may_refuse):
        return Outcome(
            writer.row, what, Verdict.UNEQUAL, f"a reader finds neither the old nor the new content: {found}"
        )
    age(place)
    again = writer.start(place).ended
    done = writer.once and found == right[1]
    if judge(again) is not (Verdict.REFUSED if done else Verdict.SURVIVED):
        return Outcome(writer.row, what, Verdict.STUCK, again.err)
    if writer.read(place) != right[1]:
        return Outcome(writer.row, what, Verdict.UNEQUAL, "the same command again writes something else")
    if left := left_over(place):
        return Outcome(writer.row, what, Verdict.LEFTOVER, ", ".join(left))
    return Outcome(writer.row, what, verdict)


def _together(writer: Writer, place: Path, chance: random.Random, new: str) -> Outcome:
    """The same command twice at once, in one folder."""
    place.mkdir()
    writer.prepare(place)
    module, delay = writer.module(place), chance.uniform(0, 0.05)

    def both() -> None:
        other = os.fork()
        time.sleep(0 if other else delay)
        status = 1
        try:
            module.main()
            status = 0
        except BaseException as error:
            if other:
                raise
            print(f"the other process: {error!r}", file=sys.stderr, flush=True)
        finally:
            if not other:
                os._exit(status)
        if os.waitpid(other, 0)[1]:
            raise UserError("the other process failed")

    twice = SimpleNamespace(__name__=module.__name__, main=both)
    ended = children.run(twice, *writer.arguments(place), before=with_cache(place / "cache"))
    what = f"{writer.row}, {delay:.4f} s apart"
    if judge(ended) is not Verdict.SURVIVED:
        return Outcome(TOGETHER, what, judge(ended), ended.err)
    if writer.read(place) != new or left_over(place):
        return Outcome(TOGETHER, what, Verdict.UNEQUAL, ended.err)
    return Outcome(TOGETHER, what, Verdict.SURVIVED)


def _digest(path: Path) -> str:
    return sha256(path) if path.is_file() else ""


# -- writers --------------------------------------------------------------------------------------------------------------


def _saving() -> Writer:
    """save_pretrained over an older model of the same shape, which differs in a setting, too."""
    models = []
    for beta in (1.0, 2.0):
        torch.manual_seed(int(beta))
        models.append(GLF((1, 8, 8), GLF.Settings(latent_dim=4, width=4, hidden=8, beta=beta)))
    old, new = models

    def prepare(place: Path) -> None:
        old.save_pretrained(place / "model")

    def read(place: Path) -> str:
        model = GLF.from_pretrained(place / "model")
        first = hashlib.sha256(next(model.parameters()).detach().numpy().tobytes()).hexdigest()
        return f"{model.settings.beta} {first}"

    def module(place: Path) -> Any:
        return SimpleNamespace(__name__="save_pretrained", main=lambda: new.save_pretrained(place / "model"))

    return Writer("save_pretrained: kills", prepare, module, lambda place: [], read, True)


def _evaluating(run: SmallRun) -> Writer:
    """`evaluate` of a finished run with an empty cache: statistics, scores.json and report.html."""

    def prepare(place: Path) -> None:
        shutil.copytree(run.whole / "run", place / "run")
        (place / "run" / "scores.json").unlink()

    def read(place: Path) -> str:
        for path in (place / "cache").rglob("[!.]*.safetensors"):
            FeatureStats.load(path)
        return _digest(place / "run" / "scores.json")

    arguments = lambda place: [place / "run"]  # noqa: E731
    return Writer("evaluate: kills", prepare, lambda place: evaluate, arguments, read)


def _sampling(run: SmallRun) -> Writer:
    """`sample --out` over an older picture."""

    def prepare(place: Path) -> None:
        shutil.copy(next((run.whole / "run" / "samples").glob("*.png")), place / "grid.png")

    arguments = lambda place: [run.whole / "run", "--n", "9", "--out", place / "grid.png"]  # noqa: E731
    return Writer("sample --out: kills", prepare, lambda place: sample, arguments, lambda p: _digest(p / "grid.png"))


def _sampling_folder(run: SmallRun) -> Writer:
    """`sample --out FOLDER`: the folder is absent or empty, or has all images."""

    def read(place: Path) -> str:
        files = sorted((place / "images").rglob("[!.]*"))
        return " ".join(f"{path.name} {_digest(path)}" for path in files)

    arguments = lambda place: [run.whole / "run", "--n", "5", "--out", place / "images"]  # noqa: E731
    return Writer("sample --out FOLDER: kills", lambda place: None, lambda place: sample, arguments, read, once=True)


def _reference(run: SmallRun) -> Writer:
    """`metrics ref --out`."""
    images = run.folder / "data.npz"

    def arguments(place: Path) -> list[object]:
        return ["ref", images, "--extractor", "tiny", "--out", place / "reference.safetensors"]

    def read(place: Path) -> str:
        return _digest(place / "reference.safetensors")

    return Writer("metrics ref --out: kills", lambda place: None, lambda place: metrics, arguments, read)


def _fetching(url: str, served: Path) -> Writer:
    """A data set from a server into an empty cache."""
    files = tuple(
        File(
            path.stem, f"sha256:{hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()}", 1 << 20, gzipped=True
        )
        for path in sorted(served.glob("*.gz"))
    )
    source = Source(
        name="faults", title="", licence="", citation="", kind="images", shape=(1,), splits={}, files=files,
        read=lambda files, split, size: None, routes=(Mirror(url),),  # type: ignore[arg-type, return-value]
    )  # fmt: skip

    def read(place: Path) -> str:
        folder = place / "cache" / "data" / "faults"
        for file in files:
            if found := file.locate(folder):
                try:
                    file.check(found)
                except Unavailable as error:
                    return f"half written: {error}"
        return "" if any(file.locate(folder) is None for file in files) else "whole"

    return Writer(
        "data from a server into the cache: kills", lambda place: None,
        lambda place: SimpleNamespace(__name__="fetch", main=source.find), lambda place: [], read,
    )  # fmt: skip


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The address of a server, a process of its own, of three files."""
    folder.mkdir()
    for i in range(3):
        (folder / f"part-{i}.gz").write_bytes(gzip.compress(random.Random(i).randbytes(300_000), mtime=0))
    handler = functools.partial(_Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        process = os.fork()
        if not process:
            try:
                children.die_with_parent()
                server.serve_forever()
            finally:
                os._exit(1)
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
