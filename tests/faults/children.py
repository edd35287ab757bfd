"""Commands in children that are forked from one process with everything imported: hundredths of a second each, not seconds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from glf_fast.errors import run_command

# What commands import only when they need it.
_LATE = (
    *(f"glf_fast.{name}" for name in ("train", "sample", "evaluate", "info", "data.__main__", "metrics.__main__")),
    *(
        "warm_commands",
        "matplotlib.backends.backend_svg",
        "matplotlib.font_manager",
        "torch.utils.tensorboard",
        "torch._dynamo",
        "sklearn.datasets",
    ),
)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """How a command ended: `status` is its exit status, or minus the signal that ended it.

    `before` is what it had written to standard error when it was interrupted; None if it was not, or had ended already.
    """

    status: int
    out: str
    err: str
    seconds: float
    hung: bool = False
    before: str | None = None

    @property
    def error_lines(self) -> list[str]:
        """The lines on standard error, without empty ones."""
        return [line for line in self.err.splitlines() if line.strip()]


def warm() -> None:
    """Import whatever a command imports, for all later children.

    torch gets one thread here and in the children: locks that other threads hold at a fork stay locked in the child.
    """
    torch.set_num_threads(1)
    for name in _LATE:
        importlib.import_module(name)
    Image.init()
    gc.collect()
    gc.freeze()  # the collector would write to the memory that children share


def run(
    module: Any,
    *arguments: object,
    before: Callable[[], None] | None = None,
    seconds: float = 60.0,
    interrupt: tuple[float, int] | None = None,
) -> Ended:
    """Run `module.main` with these arguments in a child, as `python -m` would; kill it after `seconds`.

    Args:
        module: whatever has a `main` and a `__name__`.
        before: called in the child before the command; sets limits, environment, or the injector.
        interrupt: (seconds, signal): send the child this signal after so many seconds.
    """
    out, err = os.pipe(), os.pipe()
    started = time.monotonic()
    sys.stdout.flush(), sys.stderr.flush()
    # An interrupt waits until the child can take it as a command does.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    else:
        _become(module, [str(argument) for argument in arguments], before, out, err)
    # Both set the child's group, so that it exists whoever comes first.
    with contextlib.suppress(OSError):
        os.setpgid(child, child)
    try:
        for _, writer in (out, err):
            os.close(writer)
        due = None if interrupt is None else (started + interrupt[0], interrupt[1])
        texts, hung, so_far = _read([out[0], err[0]], child, started + seconds, due)
    finally:
        with contextlib.suppress(ProcessLookupError):
            if sys.exc_info()[0] or hung:
                os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # its own children, if there are any
    return Ended(os.waitstatus_to_exitcode(status), *texts, time.monotonic() - started, hung, so_far)


def die_with_parent() -> None:
    """Let this child end with its parent, so that nothing outlives a campaign that is interrupted."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _become(
    module: Any,
    arguments: list[str],
    before: Callable[[], None] | None,
    out: tuple[int, int],
    err: tuple[int, int],
) -> None:
    """The child: never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        die_with_parent()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out[1], 1), (err[1], 2)):
            os.dup2(source, target)
        for number in (nothing, *out, *err):
            os.close(number)
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        # As in a new process, whatever the parent has installed.
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [module.__name__, *arguments]

        def main() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            module.main()

        if before:
            before()
        try:
            run_command(main)
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


def _read(
    pipes: list[int], child: int, deadline: float, interrupt: tuple[float, int] | None
) -> tuple[list[str], bool, str | None]:
    """All that the child writes until it ends or is killed at the deadline; sends the interrupting signal when it is due."""
    texts = {pipe: bytearray() for pipe in pipes}
    open_pipes, hung, before = list(pipes), False, None
    while open_pipes:
        now = time.monotonic()
        if interrupt is not None and now >= interrupt[0]:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                before = texts[pipes[1]].decode(errors="replace")
            os.kill(child, interrupt[1])  # a zombie at worst: it is waited for later
            interrupt = None
        due = deadline if interrupt is None else min(deadline, interrupt[0])
        ready, _, _ = select.select(open_pipes, [], [], max(0.0, due - now))
        if not ready and time.monotonic() >= deadline:
            if hung:
                break
            hung, deadline = True, deadline + 5.0
            os.killpg(child, signal.SIGKILL)
        for pipe in ready:
            if chunk := os.read(pipe, 1 << 16):
                texts[pipe] += chunk
            else:
                open_pipes.remove(pipe)
    for pipe in pipes:
        os.close(pipe)
    return [texts[pipe].decode(errors="replace") for pipe in pipes], hung, before
