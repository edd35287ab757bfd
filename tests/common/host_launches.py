"""Launches of CUDA kernels as calls of a library that has them compiled for the host."""

import ctypes
from collections.abc import Callable

import numpy as np

__all__ = ["launcher"]

FAILURES = {1: "there is no {}", 2: "{} takes arguments of other sizes than {}"}


def launcher(library: ctypes.CDLL, blocks: Callable[[int, int], None]) -> Callable[..., None]:
    """In the place of `glf_fast.ops.linear.cupy.launch`; `blocks` sees each launch's threads and shared bytes."""

    def launch(name: str, _: object, grid: int, block: int, shared: int, arguments: tuple, source: str = "") -> None:
        blocks(block, shared)
        values = [np.asarray(a, np.int64 if isinstance(a, int) else None).reshape(1) for a in arguments]
        sizes = [v.itemsize for v in values]
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        counted = (ctypes.c_int * len(values))(*sizes)
        failure = library.launch(name.encode(), ctypes.c_longlong(grid), shared, len(values), counted, pointers)
        assert not failure, FAILURES[failure].format(name, sizes)

    return launch
