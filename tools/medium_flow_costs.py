"""Costs of the kernels of medium flows, from their machine code: instructions of a step, and predicted microseconds.

    python tools/medium_flow_costs.py

compiles tests/csrc/cluster_path.cu for sm_90 by nvcc. A step is a number of phases with a barrier behind each. A warp executes
the loops of a phase as often as a flow's sizes say, and shares its scheduler with one other warp. What is around the loops is
counted whole, though no warp executes all of it. The least time of a step is the longest of what schedulers, matrix units, the
port from L2 and the L2 cache need for it. In the most, nothing overlaps: every phase is waited for, with its chain of products,
and so is every exchange and every byte. Figures are those of tools/flow_costs.py, for an H100 at 1.755 GHz, assumed, not
measured.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flow_costs import L2, PORT, PROCESSORS, TURN, Case, clocks
from small_flow_costs import CHAIN, CLOCK, ISSUE, LAUNCH, PRECISIONS, ROWS, Code, compiled

from glf_fast.kernels import launch_table
from glf_fast.ops.coupling_flow.cluster import PART_BLOCKS, WARPS, Section, sections
from glf_fast.ops.coupling_flow.small import FlowShape

EXCHANGE = (
    1000  # clocks of an exchange between blocks: stores, two turns at the cluster's barrier, and the fences of both
)
SCHEDULERS = 4
# Matrix instructions of a block, by precision, and those that wait for one another.
OF_BLOCK = {"float32": 3, "tf32": 2, "bf16": 2}
FLOWS = {  # D, hidden layers, steps
    "glf-cifar": (64, (256, 256), 8),
    "D 40, H 128": (40, (128, 128), 8),
    "wide": (128, (512, 512), 16),
}


class Loops(NamedTuple):
    """The loops of a pass over the steps, by the products that they make, each with those inside of it before it.

    Columns are four: over pairs of blocks, batches of lines, parts and units. Rows are two, over lines and units.
    """

    map: Sequence[Code]
    first: dict[int, Sequence[Code]]  # by lines that a warp multiplies at a time; of a backward, ∂p
    rows: dict[int, Sequence[Code]]  # by tiles of a slice
    layer: Code  # around those
    last: Sequence[Code]
    step: Code


def loops_of(code: Code) -> list[Loops]:
    """The forward's, and behind it the backward's of a kernel for gradients."""
    found = code.loops()

    def nests(at: int, sizes: tuple[int, ...], depth: int) -> dict[int, Sequence[Code]]:
        return {size: found[at + depth * i : at + depth * (i + 1)] for i, size in enumerate(sizes)}

    forward = Loops(found[:4], nests(4, (1, 2, 4), 4), nests(16, (8, 4, 2), 2), found[22], found[23:27], found[27])
    if "gradient" not in code.name:
        return [forward]
    back = Loops(found[39:43], nests(35, (1,), 4), nests(28, (8, 4, 2), 2), found[34], (), found[43])
    return [forward, back]


class Step(NamedTuple):
    """The work of a block of a cluster in a step."""

    instructions: float  # of a warp
    products: float  # of them, the matrix unit's
    chain: int  # products one behind the other
    phases: int
    exchanges: int
    bytes: int

    def clocks(self, blocks: int) -> tuple[float, float]:
        """The least and the most, beside so many blocks on the whole GPU."""
        sharing = WARPS / SCHEDULERS
        shared = max(self.bytes / PORT, blocks * self.bytes / L2)
        busy = sharing * max(self.instructions, self.products * ISSUE)
        waits = self.chain * CHAIN + self.phases * TURN + self.exchanges * EXCHANGE
        return max(busy, shared), max(sharing * self.instructions + waits + self.bytes / PORT, shared)


def _columns(loops: Sequence[Code], section: Section, turns: int, count: str) -> float:
    """Instructions of a warp that multiplies so many lines at a time, or with `count` those of this name."""
    size = [code.count(count) if count else code.count() for code in loops]
    parts = -(-section.length // PART_BLOCKS)
    batches = math.ceil(section.lines / (WARPS * turns))
    inside = parts * (size[1] - size[0]) if not count else 0
    return section.units * (size[3] - size[1]) + batches * (inside + size[0] * section.length / 2)


def _rows(loops: Sequence[Code], section: Section, count: str) -> float:
    size = [code.count(count) if count else code.count() for code in loops]
    return section.units * (size[1] - size[0]) + math.ceil(section.lines / WARPS) * size[0]


def step(s: FlowShape, loops: Loops, transposed: bool, precision: str) -> Step:
    """A step without context."""
    parts = sections(s, transposed)
    width, of_map, of_mlp = (
        s.hidden_tiles // s.blocks,
        OF_BLOCK["tf32" if precision == "tf32" else "float32"],
        OF_BLOCK[precision],
    )
    at_once = 1 if transposed else parts[1].turns
    by_columns = [(loops.map, parts[0], 1), (loops.first[at_once], parts[1], at_once)]
    by_columns += [] if transposed else [(loops.last, parts[-1], 1)]
    by_rows = parts[2:] if transposed else parts[2:-1]

    def executed(count: str) -> float:
        around = 0.0
        if not count:
            nests = [loops.map, *loops.first.values(), *([loops.last] if loops.last else [])]
            outer = sum(nest[-1].count() for nest in nests)
            of_layer = loops.layer.count() - sum(nest[-1].count() for nest in loops.rows.values())
            around = loops.step.count() - outer - loops.layer.count() + len(by_rows) * of_layer
        around += sum(_columns(*nest, count) for nest in by_columns)
        return around + sum(_rows(loops.rows[width], section, count) for section in by_rows)

    chains = [
        *(-(-section.length // 2) * (of_map if section is parts[0] else of_mlp) for _, section, _ in by_columns),
        *(math.ceil(section.lines / WARPS) * of_mlp for section in by_rows),
    ]
    phases = len(by_columns) + 2 * len(by_rows) + 1
    exchanges = len(s.hidden) if transposed else max(1, len(s.hidden) - 1)
    return Step(executed(""), executed("HMMA"), sum(chains), phases, exchanges, sum(part.bytes for part in parts))


def microseconds(s: FlowShape, rows: int, precision: str, codes: tuple[Code, Code]) -> dict[str, tuple[float, float]]:
    """The least and the most of a density and of its gradients in two launches, in a graph, with that which packs parameters.

    Products for the gradients of weights come on top, as they do for Triton's kernels.
    """
    (plain,), (keeping, back) = loops_of(codes[0]), loops_of(codes[1])
    passes = {
        "log_prob": ([step(s, plain, False, precision)], 2),
        "gradients": ([step(s, keeping, False, precision), step(s, back, True, precision)], 3),
    }
    clusters, at_once = math.ceil(rows / ROWS), PROCESSORS // s.blocks
    times = {}
    for name, (parts, launches) in passes.items():
        ends = []
        for end in (0, 1):
            waves = [min(at_once, clusters - first) for first in range(0, clusters, at_once)]
            total = sum(part.clocks(s.blocks * resident)[end] for resident in waves for part in parts)
            ends.append(launches * LAUNCH + s.steps * total / CLOCK)
        times[name] = ends[0], ends[1]
    return times


def tritons(s: FlowShape, rows: int, precision: str) -> dict[str, float]:
    """The same by Triton's kernels, whose predictions are single numbers."""
    operands = "tf32x3" if precision == "float32" else precision
    launches = dict(launch_table.entries(90))

    def took(backward: bool) -> float:
        how = launches[launch_table.key_for(backward, s.dim, s.hidden, operands, rows)]
        return clocks(Case(backward, s.dim, s.hidden, s.steps, rows, operands), how) / CLOCK

    forward = took(False)
    return {"log_prob": forward + 2 * LAUNCH, "gradients": forward + took(True) + 5 * LAUNCH}


def main() -> None:
    """Prints instructions and times."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for precision, kinds in PRECISIONS.items():
            codes = compiled(precision, 90, Path(folder), "cluster_path")
            for name, (dim, hidden, steps) in FLOWS.items():
                print(f"{name}, {precision}")
                s = FlowShape(steps, dim, 0, hidden, *kinds, blocks=8)
                for way, loops in zip(("forward", "backward"), loops_of(codes[1]), strict=True):
                    print(f"  {way}: {step(s, loops, way == 'backward', precision)}")
                for rows in (1, 16, 256, 512, 768, 1024, 2048, 4096):
                    blocks = 16 if rows <= ROWS and dim <= 64 else 8
                    of_rows = s._replace(blocks=blocks)
                    beside = tritons(s, rows, precision)
                    for what, (least, most) in microseconds(of_rows, rows, precision, codes).items():
                        print(
                            f"  {what}, {rows} rows: {least:.0f} to {most:.0f} µs; by Triton's kernels {beside[what]:.0f} µs"
                        )


if __name__ == "__main__":
    main()
