"""FrEIA's networks as chains of modules, and what each module is given: shapes, conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from glf_fast.conversion.reading import ConversionError

__all__ = [
    "UNINITIALIZED",
    "Block",
    "KeptBlock",
    "Seen",
    "block_shape",
    "blocks",
    "keep_alone",
    "own_context",
    "part_widths",
    "seen_context",
]

UNINITIALIZED = "{} (ActNorm) has not been initialised: send a batch of data through the network first"


@dataclass(frozen=True)
class Block:
    """One module of a network: its name, the indices of the conditions that it is given, and itself."""

    name: str
    conditions: tuple[int, ...]
    module: nn.Module


def is_sequence(inn: nn.Module) -> bool:
    """A SequenceINN, or a class made of it, and no GraphINN."""
    return any(kind.__name__ == "SequenceINN" for kind in type(inn).__mro__)


def blocks(inn: Any) -> tuple[list[Block], tuple[int, ...]]:
    """The network's modules, data → noise, and the shape of one sample; raises ConversionError if it is no chain."""
    if is_sequence(inn):
        return [
            Block(f"module_list.{i}", () if index is None else (index,), module)
            for i, (module, index) in enumerate(zip(inn.module_list, inn.conditions, strict=True))
        ], tuple(inn.shapes[0])
    chain = [node for node in inn.node_list if node not in inn.in_nodes + inn.out_nodes + inn.condition_nodes]
    expected: Any = inn.in_nodes[0]
    if len(inn.in_nodes) != 1 or len(inn.out_nodes) != 1:
        raise ConversionError(f"a GraphINN with {len(inn.in_nodes)} inputs and {len(inn.out_nodes)} outputs")
    for node in [*chain, inn.out_nodes[0]]:
        if node.inputs != [(expected, 0)] or len(node.outputs) > 1:
            raise ConversionError(f"GraphINN's node {node.name!r} does not follow on {expected.name!r} alone")
        expected = node
    found = [
        Block(f"node {node.name!r}", tuple(inn.condition_nodes.index(c) for c in node.conditions), node.module)
        for node in chain
    ]
    return found, tuple(inn.in_nodes[0].output_dims[0])


@dataclass(frozen=True)
class Seen:
    """Which columns of the whole context (`width`) a block is given: `columns`, in its own order."""

    columns: tuple[int, ...]
    width: int


def seen_context(conditions: Sequence[int], widths: dict[int, int]) -> Seen:
    """The columns of those conditions, where the context has all conditions of `widths` (index → columns) in order."""
    start = 0
    columns: dict[int, range] = {}
    for index in sorted(widths):
        columns[index] = range(start, start + widths[index])
        start += widths[index]
    return Seen(tuple(column for index in conditions for column in columns[index]), start)


def own_context(module: Any) -> Seen:
    """For a module on its own: the context is its own conditions, in its own order."""
    width = sum(part_widths(module))
    return Seen(tuple(range(width)), width)


def keep_alone(module: nn.Module) -> nn.Module:
    """A module as a layer whose context is its own conditions."""
    return KeptBlock(module, own_context(module), part_widths(module), type(module).__name__)


def block_shape(module: Any) -> tuple[int, ...]:
    """Of one sample that a module is given; () for a module of several inputs."""
    shapes = module.dims_in
    if isinstance(shapes[0], int):  # ActNorm keeps the one shape itself
        return tuple(shapes)
    return tuple(shapes[0]) if len(shapes) == 1 else ()


class KeptBlock(nn.Module):
    """A FrEIA module as a layer: (x, context) → (z, logdet (B,)), with the context split into its conditions."""

    def __init__(self, block: nn.Module, seen: Seen, widths: Sequence[int], name: str) -> None:
        super().__init__()
        if type(block).__name__ in ("Split", "Concat"):
            raise ConversionError(f"{name} ({type(block).__name__}): only one sample after the other can be converted")
        if type(block).__name__ in ("Flatten", "Reshape") and len(block_shape(block)) == 1:
            raise ConversionError(f"{name} ({type(block).__name__}): only images become another shape")
        if type(block).__name__.startswith("InvAuto") and type(block).__name__ != "InvAutoAct":
            raise ConversionError(f"{name} ({type(block).__name__}) has no tractable log-determinant")
        if type(block).__name__ == "IResNetLayer":
            raise ConversionError(f"{name} (IResNetLayer): its log-determinant is a random estimate")
        if getattr(block, "init_on_next_batch", False):
            raise ConversionError(UNINITIALIZED.format(name))
        self.block = block
        self.columns = list(seen.columns)
        self.widths = list(widths)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise."""
        return self._run(x, context, rev=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data."""
        return self._run(z, context, rev=True)

    def _run(self, x: Tensor, context: Tensor | None, *, rev: bool) -> tuple[Tensor, Tensor]:
        if self.widths:
            assert context is not None
            (y,), jac = self.block((x,), c=list(context[:, self.columns].split(self.widths, 1)), rev=rev)
        else:
            (y,), jac = self.block((x,), rev=rev)
        return y, jac + x.new_zeros(len(x))  # some return one number for the whole batch


def part_widths(module: Any) -> list[int]:
    """Columns, or channels, of each of a module's conditions."""
    return [dims[0] for dims in module.dims_c]
