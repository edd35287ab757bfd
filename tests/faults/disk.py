"""Failing disks under a training run: errors of the file system at file operations, and disks that are really full."""

from __future__ import annotations

import contextlib
import errno
import functools
import random
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from glf_fast import train
from tests.faults import children
from tests.faults.children import Ended
from tests.faults.injector import Fault
from tests.faults.small_run import SmallRun, small_run, with_cache
from tests.faults.verdicts import Outcome, Verdict, judge

ERRORS = "training: ENOSPC, EIO, … at the n-th file operation"
FULL = "training: a full disk (tmpfs of n kB)"
LIMITED = "training: a limit on the size of files (RLIMIT_FSIZE; mounting is not allowed here)"
_NUMBERS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOLCK)


def campaign(seed: int, count: int, folder: Path) -> Iterator[Outcome]:
    """Let `count` runs fail, every eighth one on a disk that is really full."""
    run, chance = small_run(folder.parent), random.Random(f"disk {seed}")
    size = sum(path.stat().st_blocks for path in run.whole.rglob("*")) // 2  # kB
    for i in range(count):
        place = folder / str(i)
        place.mkdir(parents=True)
        if i % 8 == 7:
            yield _full(run, place, chance.randrange(8, size * 6 // 5, 4))
        else:
            number, lasting, reads = _NUMBERS[(seed * count + i) % 7], chance.random() < 0.5, chance.random() < 0.3
            fault = Fault(chance.randrange(1, run.operations + 1), "fail", number, lasting, reads)
            met = run.start(place, fault)
            yield Outcome(ERRORS, f"{fault}{' or reads' * reads} ({met.where})", *_verdict(run, place, met.ended))
        shutil.rmtree(place)


def _verdict(run: SmallRun, place: Path, ended: Ended) -> tuple[Verdict, str]:
    """One line or survived, and then the same command goes on."""
    first = judge(ended)
    if first is Verdict.REFUSED and str(place) not in ended.error_lines[-1]:
        first = Verdict.UNCLEAR  # it does not say where
    if first not in (Verdict.SURVIVED, Verdict.REFUSED):
        return first, ended.err
    verdict, detail = run.finish(place)
    return (first if verdict is Verdict.SURVIVED else verdict), f"{detail} after {ended.err}"


def _full(run: SmallRun, place: Path, kilobytes: int) -> Outcome:
    """A run on a disk of this size, which then grows."""
    command, before = run.command(place), with_cache(place / "cache")
    if not _may_mount():

        def limited() -> None:
            before()
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (kilobytes << 8, resource.RLIM_INFINITY)
            )  # the largest file is smaller

        return Outcome(
            LIMITED, f"{kilobytes << 8} bytes", *_verdict(run, place, children.run(train, *command, before=limited))
        )
    with _mounted(place, kilobytes):
        ended = children.run(train, *command, before=before)
        _mount("-o", "remount,size=64m", str(place))
        return Outcome(FULL, f"{kilobytes} kB", *_verdict(run, place, ended))


@contextlib.contextmanager
def _mounted(place: Path, kilobytes: int) -> Iterator[None]:
    _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@functools.cache
def _may_mount() -> bool:
    with tempfile.TemporaryDirectory() as probe:
        try:
            with _mounted(Path(probe), 8):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False
