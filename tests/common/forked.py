"""Commands in processes of their own that start at once: forked by a server that has imported what they need.

This module imports nothing of glf_fast, so that a process forked by the server of torch alone has not, either.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

__all__ = ["Child", "command", "compiler", "ended", "fresh", "program", "script"]

_ROOT = Path(__file__).parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")
_WARM, _FRESH = forkserver.ForkServer(), forkserver.ForkServer()
# The commands, and what they import only when they train, read digits or draw.
_WARM.set_forkserver_preload(
    ["warm_commands", "glf_fast.train", "glf_fast.sample", "glf_fast.evaluate", "glf_fast.data.__main__",
     "glf_fast.metrics.__main__", "torch._dynamo", "sklearn.datasets", "matplotlib.backends.backend_agg",
     "matplotlib.backends.backend_svg"]
)  # fmt: skip
_FRESH.set_forkserver_preload(["torch"])


class Child:
    """A process that calls a function, with the methods of subprocess.Popen that tests need.

    It has one thread, warnings are errors, as with `python -W error`, and no file may grow beyond `file_size` bytes.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: object,
        file_size: int | None = None,
        server: forkserver.ForkServer = _WARM,
    ) -> None:
        with _as_started(), mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="error"):
            os.environ.pop("TRITON_INTERPRET", None)  # with it Triton is imported for its interpreter, for good
            server.ensure_running()
        self._printed = tempfile.TemporaryDirectory()
        about = (dict(os.environ), os.getcwd(), self._printed.name, file_size)
        self._process = _CONTEXT.Process(target=_call, args=(about, function, arguments))
        with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
            self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal that ended the process, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """See returncode."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to a process that may have ended."""
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for the end of the process; returns what it has printed, on stdout and stderr."""
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s"
        return tuple((Path(self._printed.name) / name).read_text() for name in ("stdout", "stderr"))  # type: ignore[return-value]

    def close(self) -> None:
        """Kill the process, if it still runs, and remove what it has printed."""
        self.send_signal(signal.SIGKILL)
        self._process.join()
        self._process.close()
        self._printed.cleanup()


def ended(
    function: Callable[..., None], *arguments: object, file_size: int | None = None,
    server: forkserver.ForkServer = _WARM,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """A child that has ended, as subprocess.run returns it."""
    with contextlib.closing(Child(function, *arguments, file_size=file_size, server=server)) as child:
        stdout, stderr = child.communicate()
        return subprocess.CompletedProcess([], child.returncode, stdout, stderr)


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """`python -W error -c code`: a process that has imported torch, and not glf_fast."""
    return ended(program, code, server=_FRESH)


def command(module: str, *arguments: str) -> None:
    """`python -m glf_fast.{module} …`."""
    from glf_fast.errors import run_command

    sys.argv = [module, *arguments]
    run_command(importlib.import_module(f"glf_fast.{module}").main)


def program(code: str) -> None:
    """`python -c code`."""
    exec(code, {"__name__": "__main__"})


def script(path: Path, *arguments: str) -> None:
    """`python path …`."""
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def compiler(code: str) -> subprocess.CompletedProcess[str]:
    """A program that compiles Triton's kernels with the scripts of tools/: a process that interprets them cannot."""
    tools = str(Path(__file__).parents[2] / "tools")
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        return ended(program, f"import sys\nsys.path.insert(0, {tools!r})\n{code}")


@contextlib.contextmanager
def _as_started() -> Iterator[None]:
    """The folder in which the tests run, where a test has gone elsewhere: the server imports from where it starts."""
    here = os.getcwd()
    os.chdir(_ROOT)
    try:
        yield
    finally:
        os.chdir(here)


def _call(
    about: tuple[dict[str, str], str, str, int | None], function: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    environment, folder, printed, file_size = about
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(printed) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
        setattr(sys, name, os.fdopen(number, "w", encoding=encoding, closefd=False))
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
