"""Reads in what Triton compiled whether loops load their next tiles while they multiply.

Triton turns the loads of an innermost loop into copies to shared memory that run beside the arithmetic, num_stages − 1 tiles
deep. In its GPU dialect (TTGIR) the tiles are one allocation, of which the first size counts the buffers:

    %w = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xf32, …>
    %loop:3 = scf.for %i = %c0_i32 to %c256_i32 step %c64_i32 … {
        %at = ttg.memdesc_index %w[%k] : !ttg.memdesc<2x64x64xf32, …> -> !ttg.memdesc<64x64xf32, …>
        %copy = ttg.async_copy_global_to_local %pointers, %at …

With num_stages = 2 there is one buffer: the copy of a tile starts after the products of the tile before it, and the next
iteration begins by waiting for it. With num_stages = 1 there are no copies, and the products read what `tt.load` returned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["PRODUCTS", "Loop", "Operation", "buffers", "loops"]

PRODUCTS = ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma")
STORES = ("ttg.local_store", "ttng.tmem_store")
_OPERATION = re.compile(r'(?:(%[\w.]+)(?::\d+)? = )?"?([a-z]+\.\w+)"?(.*)')
_VALUE = re.compile(r"%[\w.]+")
_LOOP = re.compile(r"\bscf\.(for|while) ")
_CARRIED = re.compile(r"(%[\w.]+) = ")
_OVER_CHUNKS = re.compile(r"scf\.for %[\w.]+ = %c\d+_i32 to %c\d+_i32 ")
_BUFFERS = re.compile(r"ttg\.memdesc_\w+ .*?: !ttg\.memdesc<(\d+)x")
_TILE_LOAD = re.compile(r"tt\.load .*: tensor<\d+x\d+x!tt\.ptr")


@dataclass(eq=False)
class Operation:
    """A line of a kernel. Operands are the lines that made each value that it reads, None a loop's or the kernel's argument."""

    name: str
    text: str
    operands: list[Operation | None]


@dataclass
class Loop:
    """`over_chunks`: its bounds are constants; `nested`: it holds another loop."""

    over_chunks: bool
    nested: bool = False
    operations: list[Operation] = field(default_factory=list)


def buffers(ttgir: str) -> int | None:
    """The least number of buffers of any tile that a loop loads for its products; None where no loop does.

    0 stands for a loop over chunks whose product reads a tile that was loaded in the same iteration, without a copy. Two kinds
    of loops do not count for such tiles: a loop that holds another one, which Triton never overlaps, whatever num_stages
    says, and the loop over a flow's steps.
    """
    found: list[int] = []
    for loop in loops(ttgir):
        for operation in loop.operations:
            if operation.name == "ttg.async_copy_global_to_local":
                target = operation.operands[1]
                index = target and _BUFFERS.match(target.text)
                assert index, f"where does this copy go: {operation.text}"
                found.append(int(index[1]))
        if loop.over_chunks and not loop.nested and _waits(loop):
            found.append(0)
    return min(found, default=None)


def loops(ttgir: str) -> list[Loop]:
    """All loops, with the operations that are in them and in no loop inside."""
    found: list[Loop] = []
    made: dict[str, Operation] = {}  # by name, of which regions that were closed may have had the same
    regions: list[Loop | None] = []  # those that are open; None: not a loop
    for line in map(str.strip, ttgir.splitlines()):
        text = line.split(" loc(")[0]
        if text.startswith("}") and regions:
            regions.pop()
        if matched := _OPERATION.match(text):
            result, name, rest = matched.groups()
            operation = Operation(name, name + rest, [made.get(value) for value in _VALUE.findall(rest)])
            if result:
                made[result] = operation
            if _LOOP.search(text):  # what it carries may be named like values of a region that was closed
                for name in _CARRIED.findall(text.partition(" scf.")[2] or text):
                    made.pop(name, None)
            if inner := next((loop for loop in reversed(regions) if loop), None):
                inner.operations.append(operation)
        if text.endswith("{"):
            opened = Loop(bool(_OVER_CHUNKS.search(text))) if _LOOP.search(text) else None
            if opened:
                for loop in filter(None, regions):
                    loop.nested = True
                found.append(opened)
            regions.append(opened)
    return found


def _waits(loop: Loop) -> bool:
    """Whether a product of the loop reads a tile that a plain load of the same iteration returned."""
    own = set(map(id, loop.operations))
    for store in loop.operations:  # a tile that stands in memory was made by what is stored there
        if store.name in STORES and (memory := store.operands[1]):
            own.add(id(memory))
            memory.operands.append(store.operands[0])
    seen: set[int] = set()
    todo = [factor for product in loop.operations if product.name in PRODUCTS for factor in product.operands[:2]]
    while todo:
        operation = todo.pop()
        if operation is None or id(operation) not in own or id(operation) in seen or operation.name in PRODUCTS:
            continue
        if _TILE_LOAD.match(operation.text):
            return True
        seen.add(id(operation))
        todo += operation.operands
    return False
