"""Puts layers in the places of others, in the lists of each library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from glf_fast.conversion import adapters
from glf_fast.conversion.freia_blocks import Block

__all__ = ["Replacement", "module_list", "put_in_graph", "put_in_sequence", "put_transform", "replaced"]

# Layers start … stop − 1, and the module that takes their place.
Replacement = tuple[int, int, nn.Module]


def put_in_sequence(inn: Any, blocks: Sequence[Block], replacements: Sequence[Replacement]) -> None:
    """In a FrEIA `SequenceINN`, which keeps conditions and shapes beside its modules."""
    conditions: list[int | None] = []
    starts = {start: stop for start, stop, _ in replacements}
    shapes, i = [inn.shapes[0]], 0
    while i < len(blocks):
        stop = starts.get(i, i + 1)
        given = [index for block in blocks[i:stop] for index in block.conditions]
        conditions.append(given[0] if given else None)
        shapes.append(inn.shapes[stop])
        i = stop
    inn.module_list = module_list(replaced([block.module for block in blocks], replacements), inn.module_list)
    inn.conditions, inn.shapes = conditions, shapes


def put_in_graph(inn: Any, replacements: Sequence[Replacement]) -> None:
    """The node that is given the conditions gets the fused module, the others hand on what they get."""
    chain = [node for node in inn.node_list if node.module is not None]
    originals = [node.module for node in chain]
    for start, stop, adapter in replacements:
        holder = next((i for i in range(start, stop) if chain[i].conditions), start)
        for i in range(start, stop):
            originals[i] = adapter if i == holder else adapters.PassedOn().train(adapter.training)
    for node, module in zip(chain, originals, strict=True):
        node.module = module
    inn.module_list = module_list(originals, inn.module_list)


def put_transform(
    flow: nn.Module, name: str, chain: str, named: list[tuple[str, nn.Module]], replacements: Sequence[Replacement]
) -> None:
    """Put them where flow.`name` is one transform, or has its transforms in a list called `chain`."""
    modules, transform = replaced([m for _, m in named], replacements), getattr(flow, name)
    if len(named) == 1 and transform is named[0][1]:
        (module,) = modules
        setattr(flow, name, module)
    else:
        setattr(transform, chain, module_list(modules, getattr(transform, chain)))


def module_list(modules: Iterable[nn.Module], instead_of: nn.Module) -> nn.ModuleList:
    """In the same mode; the modules keep theirs."""
    new = nn.ModuleList(modules)
    new.training = instead_of.training
    return new


def replaced(modules: Sequence[nn.Module], replacements: Sequence[Replacement]) -> list[nn.Module]:
    """The modules, with the adapters in the places of those that they replace."""
    result, position = [], 0
    for start, stop, adapter in replacements:
        result += [*modules[position:start], adapter]
        position = stop
    return [*result, *modules[position:]]
