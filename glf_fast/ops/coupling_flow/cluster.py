"""Sizes of medium coupling flows, of which a cluster of blocks shares sixteen rows (csrc/cuda/cluster_sections.cuh)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from glf_fast.ops.coupling_flow.small import FlowShape

__all__ = ["DEPTHS", "Section", "hidden_tiles", "most_rows", "sections", "shared_bytes", "slot_bytes", "step_bytes"]

DEPTHS = (8, 16, 32)  # rows of a weight in a block of 512 bytes, by precision
BARRIER_BYTES = 64
SLICES = (2, 4, 8)  # tiles of 8 columns of a hidden layer that a block can own
WARPS, UNIT_BLOCKS, PART_BLOCKS = 8, 64, 8
PLACES_BYTES = 2 * 64 * 8  # of the units of a step, in both directions

# Where clusters are chosen and Triton's kernels are not: most rows of a pass without gradients, and of one with them, by the
# widest hidden layer and by precision (float32, tf32, bf16). Up to there the longest predicted time is shorter than Triton's
# (tools/medium_flow_costs.py; nothing was measured). 256 rows are as many clusters of eight blocks as an H100 holds.
MOST_ROWS = {
    128: ((256, 512), (0, 256), (0, 256)),
    256: ((256, 768), (256, 512), (0, 256)),
    512: ((512, 1024), (512, 768), (256, 512)),
}


class Section(NamedTuple):
    """The parameters of one product: a vector in front of each unit, and lines of blocks."""

    vector: int  # pieces of 16 bytes
    lines: int
    length: int
    sliced: bool  # each block of the cluster has one of its own

    @property
    def turns(self) -> int:
        """Lines that each warp has of a unit."""
        return 4 if self.length <= 2 else 2 if self.length <= 4 else 1

    @property
    def units(self) -> int:
        """Pieces in which it is copied."""
        return -(-self.lines // (WARPS * self.turns)) * -(-self.length // PART_BLOCKS)

    @property
    def bytes(self) -> int:
        """Bytes that a block reads of it."""
        return 16 * self.units * self.vector + 512 * self.lines * self.length


def most_rows(s: FlowShape, gradients: bool) -> int:
    """Most rows for which clusters are chosen; of one hidden layer, or of narrow ones only, Triton's kernels are."""
    if len(s.hidden) < 2 or max(s.hidden) <= 64:
        return 0
    return next(rows for width, rows in MOST_ROWS.items() if max(s.hidden) <= width)[s.mlp][gradients]


def hidden_tiles(blocks: int, widest: int) -> int:
    """Tiles of 8 columns to which hidden layers are padded.

    Raises:
        ValueError: so many blocks cannot own such a layer.
    """
    slices = [n for n in SLICES if 8 * n * blocks >= widest]
    if not slices:
        raise ValueError(f"hidden layers of up to {8 * SLICES[-1] * blocks} units; got {widest}")
    return blocks * slices[0]


def _blocks_of(precision: int, tiles: int) -> int:
    return -(-8 * tiles // DEPTHS[precision])


def sections(s: FlowShape, transposed: bool) -> Sequence[Section]:
    """The map, the hidden layers in their order, and the last layer."""
    state, every, width = 2 * s.half_tiles, s.hidden_tiles, s.hidden_tiles // s.blocks
    context, inner = -(-s.context // 8), len(s.hidden) - 1
    of_map, of_slice = _blocks_of(s.map, state), _blocks_of(s.mlp, width)
    if transposed:
        return (
            Section(0, state, of_map, False),
            Section(0, s.half_tiles + context, of_slice, True),
            *[Section(0, _blocks_of(s.mlp, every), width, True)] * inner,
            Section(0, _blocks_of(s.mlp, state), width, True),
        )
    lines, first = every if inner else width, _blocks_of(s.mlp, s.half_tiles) + _blocks_of(s.mlp, context)
    return (
        Section(2 * state + 1, state, of_map, False),
        Section(2 * lines, lines, first, not inner),
        *[Section(2 * width, _blocks_of(s.mlp, every), width, True)] * inner,
        Section(2 * state, state, of_slice, True),
    )


def step_bytes(s: FlowShape) -> tuple[int, int]:
    """Bytes of a packed step in memory: the forward's, and the transposed one of the backward."""
    forward, back = (
        sum(part.bytes * (s.blocks if part.sliced else 1) for part in sections(s, transposed))
        for transposed in (False, True)
    )
    return forward, back


def slot_bytes(s: FlowShape) -> int:
    """Bytes of the largest unit."""
    return 16 * (32 * UNIT_BLOCKS + 2 * max(s.hidden_tiles, 2 * s.half_tiles + 1))


def shared_bytes(s: FlowShape, slots: int) -> int:
    """Bytes of shared memory of a block with so many slots for units."""
    rows, context, width = 2 * s.half_tiles, -(-s.context // 8), s.hidden_tiles // s.blocks
    exchange = max(s.blocks * max(rows, s.half_tiles + context), s.hidden_tiles)
    tiles = 2 * rows + max(rows, context) + s.hidden_tiles + width + WARPS * width + exchange
    return BARRIER_BYTES + slots * slot_bytes(s) + PLACES_BYTES + 512 * tiles
