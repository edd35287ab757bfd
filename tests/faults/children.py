"""Commands in children that are forked from one process with everything imported: hundredths of a second each, not seconds."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Ended:
    """How a command ended: `status` is its exit status, or minus the signal that ended it."""

    status: int
    out: str
    err: str
    seconds: float
    hung: bool = False

    @property
    def error_lines(self) -> list[str]:
        """Lines on standard error that are no progress and no warning."""
        return [line for line in self.err.splitlines() if line.strip()]


def run(
    module: ModuleType, *arguments: object, before: Callable[[], None] | None = None, seconds: float = 60.0
) -> Ended:
    """Run `module.main` with these arguments in a child, as `python -m` would; stop it after `seconds`.

    `before` runs in the child, before the command: it sets limits, environment, or the injector.
    """
    out, err = os.pipe(), os.pipe()
    started = time.monotonic()
    child = os.fork()
    if not child:
        _become(module, [str(argument) for argument in arguments], before, out, err)
    for _, writer in (out, err):
        os.close(writer)
    texts, hung = _read([out[0], err[0]], child, started + seconds)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), *texts, time.monotonic() - started, hung)


def _become(
    module: ModuleType,
    arguments: list[str],
    before: Callable[[], None] | None,
    out: tuple[int, int],
    err: tuple[int, int],
) -> None:
    """The child: never returns."""
    status = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out[1], 1), (err[1], 2)):
            os.dup2(source, target)
        for number in (nothing, *out, *err):
            os.close(number)
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [module.__name__, *arguments]
        if before:
            before()
        try:
            module.main()
            status = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(status)


def _read(pipes: list[int], child: int, deadline: float) -> tuple[list[str], bool]:
    """All that the child writes, until it ends or is stopped at the deadline."""
    texts = {pipe: bytearray() for pipe in pipes}
    open_pipes, hung = list(pipes), False
    while open_pipes:
        ready, _, _ = select.select(open_pipes, [], [], max(0.0, deadline - time.monotonic()))
        if not ready and not hung:
            hung, deadline = True, time.monotonic() + 5.0
            os.killpg(child, signal.SIGKILL)
        elif not ready:
            break
        for pipe in ready:
            if chunk := os.read(pipe, 1 << 16):
                texts[pipe] += chunk
            else:
                open_pipes.remove(pipe)
    for pipe in pipes:
        os.close(pipe)
    return [texts[pipe].decode(errors="replace") for pipe in pipes], hung
