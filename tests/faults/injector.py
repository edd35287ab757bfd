"""Faults at the n-th file operation of a command: kills, signals, and errors of the file system (injector.c)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import children
from tests.faults.children import Ended

# In the order of injector.c.
ACTIONS = ("count", "kill before", "kill in the middle of", "kill after", "signal", "fail")
KILLS = ACTIONS[1:4]


class Plan(ctypes.Structure):
    """injector.c's plan_t."""

    _fields_ = (
        ("action", ctypes.c_int),
        ("number", ctypes.c_int),
        ("lasting", ctypes.c_int),
        ("reads", ctypes.c_int),
        ("at", ctypes.c_long),
        ("count", ctypes.c_long),
        ("fired", ctypes.c_int),
        ("folder", ctypes.c_char * 1024),
        ("where", ctypes.c_char * 1024),
    )


@dataclass(frozen=True)
class Fault:
    """A fault at the file operation number `at`.

    Attributes:
        action: one of ACTIONS.    number: the signal, or the errno.    lasting: whether everything fails from then on.
        reads: whether opening for reading and reading count, too.
    """

    at: int = 0
    action: str = "count"
    number: int = 0
    lasting: bool = False
    reads: bool = False

    def __str__(self) -> str:
        what = self.action
        if self.action == "signal":
            what = f"{signal.Signals(self.number).name} at"
        elif self.action == "fail":
            what = f"{errno.errorcode[self.number]}{' from then on' * self.lasting} at"
        return f"{what} operation {self.at}"


@dataclass(frozen=True)
class Met:
    """A command, and the fault that it met.

    Attributes:
        ended: the command's end.    operations: file operations below the folder.
        where: the operation at which the fault happened; "" if there were too few.
    """

    ended: Ended
    operations: int
    where: str


def meet(
    fault: Fault,
    folder: Path,
    module: Any,
    *arguments: object,
    before: Callable[[], None] | None = None,
    seconds: float = 60.0,
) -> Met:
    """Run a command in a child that meets the fault in its operations below `folder`. The library must be preloaded."""
    shared = mmap.mmap(-1, ctypes.sizeof(Plan))  # shared with the child, and readable after its death
    plan = Plan.from_buffer(shared)
    plan.action, plan.number, plan.lasting = ACTIONS.index(fault.action), int(fault.number), fault.lasting
    plan.reads, plan.at, plan.folder = fault.reads, fault.at, os.fsencode(os.path.realpath(folder))

    def arm() -> None:
        if before:
            before()
        ctypes.CDLL(None).faults_arm(ctypes.byref(plan))

    ended = children.run(module, *arguments, before=arm, seconds=seconds)
    return Met(ended, plan.count, plan.where.decode(errors="replace") if plan.fired else "")
