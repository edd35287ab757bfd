"""Where a library's flow has its layers, and how others are put in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = [
    "Chain", "ContextColumns", "Part", "Replacement", "Shape", "module_list", "put_in_list", "put_transform", "replaced",
]  # fmt: skip

Shape = tuple[int, ...]
# Layers start … stop − 1, and the module that takes their place.
Replacement = tuple[int, int, nn.Module]


@dataclass(frozen=True)
class ContextColumns:
    """The columns, or channels, of a context of that width that a layer is given, in its own order."""

    columns: tuple[int, ...]
    width: int

    def index(self) -> slice | list[int]:
        """The index of the columns in the context."""
        return slice(None) if self.columns == tuple(range(self.width)) else list(self.columns)


@dataclass(frozen=True)
class Part:
    """One layer of a library's flow."""

    name: str  # for messages
    module: Any
    shape: Shape  # of one sample that it is given, (D,) or (C, H, W)
    conditions: tuple[int, ...] = ()  # their indices, where layers are given different ones (FrEIA)
    # The columns of these in the flow's context; None for a layer on its own, whose context they are.
    context: ContextColumns | None = None


@dataclass(frozen=True)
class Chain:
    """Layers that work one after the other; `put(replacements)` puts others in the places parts[start:stop]."""

    parts: list[Part]
    put: Callable[[Sequence[Replacement]], None]


def put_transform(holder: nn.Module, name: str, chain: str, parts: list[Part], new: Sequence[Replacement]) -> None:
    """Put replacements where holder.`name` is one transform, or has its transforms in a list called `chain`."""
    modules, transform = [part.module for part in parts], getattr(holder, name)
    if modules == [transform]:
        setattr(holder, name, replaced(modules, new)[0])
    else:
        put_in_list(transform, chain, modules, new)


def put_in_list(holder: nn.Module, name: str, modules: Sequence[nn.Module], new: Sequence[Replacement]) -> None:
    """Put replacements where the list holder.`name` has these modules, in compositions, too."""
    setattr(holder, name, module_list(replaced(modules, new), getattr(holder, name)))


def module_list(modules: Iterable[nn.Module], instead_of: nn.Module) -> nn.ModuleList:
    """A list in the mode of the one that it replaces; the modules keep their modes."""
    new = nn.ModuleList(modules)
    new.training = instead_of.training
    return new


def replaced(modules: Sequence[nn.Module], replacements: Sequence[Replacement]) -> list[nn.Module]:
    """The modules, with the replacements in their places."""
    result, position = [], 0
    for start, stop, new in replacements:
        result += [*modules[position:start], new]
        position = stop
    return [*result, *modules[position:]]
