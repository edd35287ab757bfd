"""Compiles Triton kernels without a GPU, and says what they take: registers, spilled bytes, shared memory, buffers of loops.

As a program it is the worker of `Compiler`, so that one process can ask several Triton versions.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipelines import buffers

__all__ = ["Compiler", "Compilers", "Resources", "compiled", "resources"]


class Resources(NamedTuple):
    """Needs of one compiled kernel.

    Registers a thread, bytes of its stack (spills), bytes of shared memory a program, and the least number of buffers of its
    loops (pipelines.py; None: no loop loads tiles).
    """

    registers: int
    spills: int
    shared: int
    buffers: int | None


def compiled(spec: Any, arch: int) -> Any:
    """A `specialization.Specialization`, compiled for sm_`arch` in this process. Not under TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}
    # Tensors start at multiples of 16 bytes, which the launcher finds out by itself, unless the kernel forbids it: loads are as
    # wide as that allows. Numbers it finds multiples of 16 among are not in a signature, so that kernels must forbid that.
    aligned = {}
    for i, parameter in enumerate(spec.kernel.params):
        kinds = spec.signature[parameter.name]
        if parameter.do_not_specialize:
            continue
        assert kinds not in ("i32", "i64"), f"{spec.name}: the launcher specializes the number {parameter.name}"
        for path, kind in [((i, j), k) for j, k in enumerate(kinds)] if isinstance(kinds, tuple) else [((i,), kinds)]:
            if kind.startswith("*"):
                aligned[path] = [["tt.divisibility", 16]]
    source = ASTSource(spec.kernel, spec.signature, spec.constexprs, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(spec: Any, arch: int) -> Resources:
    """What a kernel takes, by compiling it."""
    import triton

    kernel = compiled(spec, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump.stdout)
    assert found, dump.stdout
    return Resources(int(found[1]), int(found[2]), kernel.metadata.shared, buffers(kernel.asm["ttgir"]))


class Compiler:
    """A process that compiles; `folder` holds another Triton than the installed one (pip install --no-deps --target)."""

    def __init__(self, folder: str | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if folder:
            environment["PYTHONPATH"] = folder
        command = [sys.executable, "-W", "ignore", __file__]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout
        self.version = self.process.stdout.readline().strip()

    def resources(self, spec: Any, arch: int) -> Resources | None:
        """What a kernel takes; None where this Triton cannot compile it."""
        assert self.process.stdin and self.process.stdout
        request = [spec.kernel.__module__, spec.kernel.__name__, *spec[2:], arch]
        self.process.stdin.write(json.dumps(request) + "\n")
        found = json.loads(self.process.stdout.readline())
        return found and Resources(*found)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class Compilers:
    """Processes that compile with several Triton versions, of each as many as there are processors: often one is waited for."""

    def __init__(self, folders: Sequence[str | None]) -> None:
        each = os.cpu_count() or 1
        self._all = [[Compiler(folder) for _ in range(each)] for folder in folders]
        self.versions = [compilers[0].version for compilers in self._all]
        self._free: list[queue.SimpleQueue[Compiler]] = [queue.SimpleQueue() for _ in folders]
        for free, compilers in zip(self._free, self._all, strict=True):
            for compiler in compilers:
                free.put(compiler)
        self._threads = [ThreadPoolExecutor(each) for _ in folders]

    def submit(self, spec: Any, arch: int) -> list[Future[Resources | None]]:
        """`Compiler.resources` of each version, to be waited for. What is submitted first is compiled first."""
        return [
            threads.submit(self._compile, free, spec, arch)
            for threads, free in zip(self._threads, self._free, strict=True)
        ]

    def submit_last(self, spec: Any, arch: int) -> Future[Resources | None]:
        """The same with the last version alone."""
        return self._threads[-1].submit(self._compile, self._free[-1], spec, arch)

    def _compile(self, free: queue.SimpleQueue[Compiler], spec: Any, arch: int) -> Resources | None:
        compiler = free.get()
        try:
            return compiler.resources(spec, arch)
        finally:
            free.put(compiler)

    def close(self) -> None:
        """End the processes; what has not begun is not compiled."""
        for threads in self._threads:
            threads.shutdown(cancel_futures=True)
        for compilers in self._all:
            for compiler in compilers:
                compiler.close()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _work() -> None:
    import triton
    from specialization import Specialization

    print(triton.__version__, flush=True)
    for line in sys.stdin:
        module, name, signature, constexprs, num_warps, num_stages, arch = json.loads(line)
        kernel = getattr(importlib.import_module(module), name)
        signature, constexprs = ({key: _tuples(value) for key, value in m.items()} for m in (signature, constexprs))
        try:
            found = resources(Specialization("", kernel, signature, constexprs, num_warps, num_stages), arch)
        except Exception as error:  # every pass of the compiler has its own kinds
            print(error, file=sys.stderr)
            found = None
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _work()
