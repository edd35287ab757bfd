"""The rational-quadratic splines of other libraries, computed by `ops.spline`, for code that cannot be changed."""

from __future__ import annotations

import sys
import threading
import warnings
from types import TracebackType
from typing import Any

import torch

from glf_fast.integrations.splines import functions, transforms

__all__ = ["fast_splines"]


class fast_splines:  # a function to its users, as torch.no_grad is
    """Replace the spline functions of nflows and normflows and zuko's spline class, until `undo()` or the end of `with`:

        with glf_fast.integrations.fast_splines():
            flow.log_prob(x)

        replaced = glf_fast.integrations.fast_splines()
        flow.log_prob(x)
        replaced.undo()

    What is replaced is found in the modules that are loaded at the call, in whatever modules the functions were imported into
    and under whatever names; libraries that are imported later keep their own. Copies of the functions inside of other packages
    are replaced, too. Each function is compared with its replacement once, on random numbers in float64, and left alone if
    they differ.

    Arguments that `ops.spline` does not cover go to the library's own function: see docs/drop-in.md.

    Blocks may be nested, and one object may be entered again; what was there comes back when the last of them has ended.
    `replaced` names what was replaced. Warns if no library with such splines is loaded.
    """

    def __init__(self) -> None:
        self._blocks = 0
        self._active = False
        self._begin()

    @property
    def replaced(self) -> tuple[str, ...]:
        """The functions and classes that are replaced now, with the modules in which they are defined."""
        originals = [*(original for original, _ in _originals.values()), *_constructors]
        return tuple(sorted(f"{original.__module__}.{original.__name__}" for original in originals))

    def undo(self) -> None:
        """Put back what was there, unless another object still needs it replaced."""
        with _lock:
            if self._active:
                self._active = False
                _end()

    def __enter__(self) -> fast_splines:
        self._blocks += 1
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._blocks -= 1
        if not self._blocks:
            self.undo()

    def __repr__(self) -> str:
        return f"<fast_splines: {', '.join(self.replaced) or 'nothing replaced'}>"

    def _begin(self) -> None:
        with _lock:
            if not self._active:
                self._active = True
                _begin()


# -- for all objects together ------------------------------------------------------------------------------------------

_lock = threading.RLock()
_count = 0  # active objects
_originals: dict[int, tuple[Any, Any]] = {}  # id of a replaced function → itself, and what stands for it
_constructors: dict[Any, tuple[Any, Any]] = {}  # replaced class → its constructor, and what stands for it
_proofs: dict[Any, Any] = {}  # function or class → what can stand for it, or None


def _begin() -> None:
    global _count
    _count += 1
    known = {id(ours) for _, ours in _originals.values()}
    for module in list(sys.modules.values()):
        names = _names_in(module)
        for name in functions.NAMES:
            value = names.get(name)
            if id(value) in known or not functions.takes(value):
                continue
            if (ours := _proof(functions.proved, value)) is not None:
                _originals[id(value)] = value, ours
        kind: Any = names.get(transforms.NAME)
        if (
            transforms.takes(kind)
            and kind not in _constructors
            and (ours := _proof(transforms.proved, kind)) is not None
        ):
            _constructors[kind] = kind.__init__, ours
    for kind, (_, ours) in _constructors.items():
        kind.__init__ = ours
    _swap(_originals)
    if not _originals and not _constructors:
        warnings.warn(
            "fast_splines found no splines to replace: import the library first (nflows, normflows, zuko, or one that contains "
            "a copy of them)",
            stacklevel=4,
        )


def _end() -> None:
    global _count
    _count -= 1
    if _count:
        return
    _swap({id(ours): (ours, original) for original, ours in _originals.values()})
    for kind, (original, ours) in _constructors.items():
        if kind.__init__ is ours:
            kind.__init__ = original
    _originals.clear()
    _constructors.clear()


def _proof(prove: Any, original: Any) -> Any:
    """What stands for a function or class, proved once in a process."""
    if original not in _proofs:
        with torch.no_grad():
            _proofs[original] = prove(original)
    return _proofs[original]


def _swap(values: dict[int, tuple[Any, Any]]) -> None:
    """Replace these values in all loaded modules, whatever their names are: id of a value → the value, the new one."""
    for module in list(sys.modules.values()):
        names = _names_in(module)
        for name, value in list(names.items()):
            if id(value) in values:
                names[name] = values[id(value)][1]


def _names_in(module: Any) -> dict[str, Any]:
    """The names of a module as they are: to ask a module for an attribute may import others."""
    try:
        names = object.__getattribute__(module, "__dict__")
    except AttributeError:  # sys.modules may contain anything
        return {}
    return names if isinstance(names, dict) else {}
