"""What a launch of a flow kernel costs, by arithmetic: ranks launches before any is compiled or measured.

A program carries its rows through the phases of a step (kernels/mlp.py), one after the other. A phase takes the clocks of its
longest chain: tiles that are waited for, then dependent products, then numbers that are activated. It also occupies what all
programs of a multiprocessor, or of the GPU, share: the port to L2, matrix units, schedulers. Few rows are one program on a
multiprocessor, whose chains count; many rows are several waves of several programs, of which either counts that takes longer.

Figures are for an H100 at 1.755 GHz, assumed from published microbenchmarks, not measured. They rank; a predicted time may be
30 % off.

A loop over n chunks whose tiles are loaded s − 1 deep (num_stages = s, pipelines.py), each L clocks after it was asked for
and then multiplied in C clocks, has the period max(C, (C + L)/(s − 1)): with s = 2 that is C + L, nothing overlaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from glf_fast.kernels.flow_options import sizes
from glf_fast.kernels.launch_table import Launch

__all__ = ["Case", "clocks", "program", "shared_bytes"]

PROCESSORS = 132
LATENCY = (
    650  # clocks from asking for a tile to multiplying it, its transfer apart: L2, addresses, wait, barrier, operands
)
PORT = 64  # bytes a clock from L2 into one multiprocessor
L2 = 3100  # bytes a clock from L2 into all: 5.5 TB/s
MEMORY = 1900  # bytes a clock to and from HBM: 3.35 TB/s
CHAIN = 24  # clocks of one matrix instruction of a chain of dependent ones
ISSUE = 6.5  # clocks that it occupies one of the four matrix units; of warp groups, 64 rows at once:
ISSUE_WIDE = 4.5
TURN = 100  # clocks of a result on its way to the operand of the next product: through shared memory, with a barrier
BARRIER = 40
ELEMENT = 6  # instructions a number of a hidden layer: bias, activation, rounding, conversion, store
COUPLING = 40  # instructions a transformed number: log-scale, exponential, coupling, sum
SPLINE, BIN = 200, 60  # instructions a spline, and more for each of its bins: counted in kernels/spline.py's forward
SCHEDULED = 128  # instructions of threads a clock: four schedulers
REGISTERS = 65_536
SHARED = 228 << 10  # bytes of shared memory of a multiprocessor
RESERVED = 1 << 10  # bytes of shared memory that each program takes beside its own


@dataclass(frozen=True)
class Case:
    """A flow, its direction and a batch: what a launch is chosen for."""

    backward: bool
    dim: int
    hidden: tuple[int, ...]
    steps: int
    rows: int
    precision: str  # of the MLP's operands
    bins: int = 0  # of splines, as they are packed; 0: an affine coupling

    @property
    def item(self) -> int:
        """Bytes of a packed weight."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class Cost:
    """Clocks of one program, and what it takes of that which programs share."""

    clocks: float = 0.0
    bytes: float = 0.0  # from L2
    units: float = 0.0  # clocks of a multiprocessor's matrix units
    instructions: float = 0.0  # of threads

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.clocks + other.clocks,
            self.bytes + other.bytes,
            self.units + other.units,
            self.instructions + other.instructions,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(self.clocks * times, self.bytes * times, self.units * times, self.instructions * times)


@cache
def shape(case: Case) -> dict[str, Any]:
    """The sizes that the case's kernels know at compile time."""
    spline = (case.bins, -1) if case.bins else ()  # with linear tails
    return sizes(case.dim, case.hidden, 0, spline)


def warp_groups(how: Launch) -> bool:
    """Whether four warps multiply 64 rows with one instruction, as from sm_90 on."""
    return how.rows >= 64 and how.num_warps % 4 == 0


def product(rows: int, inner: int, columns: int, how: Launch, precision: str) -> Cost:
    """Rows [rows, inner] times weights [inner, columns], both in shared memory."""
    times = 3 if precision == "tf32x3" else 1
    item, depth = (2, 16) if precision == "bf16" else (4, 8)
    instructions = max(1, rows // 16) * max(1, columns // 8) * math.ceil(inner / depth) * times  # m16n8 each
    wide = warp_groups(how)
    units = instructions * (ISSUE_WIDE if wide else ISSUE) / 4
    # A warp has whole tiles of 16 × 8: with fewer tiles than warps, some compute what others compute.
    busy = min(4, how.num_warps, max(1, rows // 16) * max(1, columns // 8)) / 4
    # Operands come to the warps through shared memory, 128 bytes a clock: weights once for every 16 rows (64 of a warp group),
    # rows once for every warp beside another.
    weights = inner * columns * item * max(1, rows // (64 if wide else 16) // how.num_warps)
    across = rows * inner * item * min(how.num_warps, max(1, columns // 8))
    read = (weights + (0 if wide else across)) * times / 128
    chain = math.ceil(inner / depth) * times * CHAIN
    loads = inner * columns * (times if wide else 1) / 4 if precision != "bf16" else inner * columns / 16
    return Cost(TURN + max(chain, units / busy, read), 0.0, units, 32 * instructions + loads)


def numbers(count: float, instructions: int, how: Launch) -> Cost:
    """Elementwise work on `count` numbers: a thread's own ones hide one another's latency only in part."""
    total = count * instructions
    each = count / (32 * how.num_warps)
    return Cost(max(total / SCHEDULED, 4 * instructions + each * instructions), 0.0, 0.0, total)


def waiting(moved: float) -> Cost:
    """A tile, or several asked for at once, that nothing overlaps."""
    return Cost(LATENCY + moved / PORT, moved)


def _period(work: float, moved: float, stages: int) -> float:
    """Clocks from one iteration to the next, of a loop whose tiles are loaded `stages` − 1 deep."""
    return max(work, moved / PORT, (work + LATENCY + moved / PORT) / (stages - 1))


def loop(n: int, moved: float, work: Cost, stages: int) -> Cost:
    """n chunks of `moved` bytes each, loaded `stages` − 1 deep, and the work on each."""
    if n == 1:
        return waiting(moved) + work
    flowing = max(work.clocks, moved / PORT)
    at_once = min(n, stages - 1)  # these were asked for before the loop
    took = LATENCY + moved / PORT + at_once * flowing + (n - at_once) * _period(work.clocks, moved, stages)
    return replace(work * n, clocks=took, bytes=n * moved)


def program(case: Case, how: Launch) -> Cost:
    """One program through one step."""
    constants = shape(case)
    half: int = constants["HALF"]
    layers = [b - a for a, b in zip(constants["COLUMNS"], constants["COLUMNS"][1:])]  # noqa: B905
    maps = "tf32" if case.precision == "bf16" else case.precision
    staged = how.staged or case.backward or case.bins > 0
    BM, BN, BK, stages = how.rows, how.columns, how.depth, how.num_stages

    def dot(inner: int, columns: int) -> Cost:
        return product(BM, inner, columns, how, case.precision)

    def hidden(columns: int) -> Cost:
        """Activating a chunk; where layers pass through memory, also storing it."""
        work = numbers(BM * columns, ELEMENT * (2 if staged else 1), how)
        return replace(work, bytes=BM * columns * case.item) if staged else work

    def through_memory(inner: int, columns: int) -> Cost:
        """Rows in memory [BM, inner] times a chunk of weights, BK at a time."""
        depth = min(BK, inner)
        return loop(-(-inner // depth), (depth * columns + BM * depth) * case.item, dot(depth, columns), stages)

    def affine() -> Cost:
        """All four blocks, or the rows through memory."""
        if half <= 32:
            blocks = product(BM, half, half, how, maps)
            return replace(blocks * 4, bytes=16 * half * half)  # they were asked for during the step before
        # The halves of the rows one after the other, each times two blocks.
        depth = min(BK, half)
        work = product(BM, depth, half, how, maps) * 2
        return loop(half // depth, (2 * half + BM) * depth * 4, work, stages) * 2 + Cost(2 * BARRIER + LATENCY / 2)

    # No loop inside the one over steps: the compiler loads the tiles of whole steps ahead.
    whole = not staged and len(layers) == 2 and max(layers) <= BN and half <= 32
    turn = Cost(BARRIER + LATENCY / 2)  # stores, a barrier, and the first load of what was stored
    chunks = [-(-n // BN) for n in layers]
    out = 2 * half

    def forward() -> Cost:
        if not staged and len(layers) == 2:
            first = dot(half, layers[0]) + numbers(BM * layers[0], ELEMENT, how)
            first = replace(first, bytes=half * layers[0] * case.item)
            each = dot(layers[0], BN) + hidden(BN) + dot(BN, out)
            if whole:
                return first + replace(each, bytes=(layers[0] + out) * BN * case.item)
            return first + loop(chunks[1], (layers[0] * BN + BN * out) * case.item, each, stages)
        if len(layers) == 1:
            return loop(
                chunks[0], (half * BN + BN * out) * case.item, dot(half, BN) + hidden(BN) + dot(BN, out), stages
            )
        total = loop(chunks[0], half * BN * case.item, dot(half, BN) + hidden(BN), stages) + turn
        for i in range(1, len(layers)):
            each = through_memory(layers[i - 1], BN) + hidden(BN)
            if i == len(layers) - 1 and not case.bins:
                each += waiting(BN * out * case.item) + dot(BN, out)
            total += each * chunks[i] + turn
        return total + splines() if case.bins else total

    def splines() -> Cost:
        """A group of columns after the other: widths, heights, slopes, then the splines."""
        each = numbers(BM * how.group, (SPLINE + BIN * case.bins) * (3 if case.backward else 1), how)
        each += through_memory(layers[-1], how.group * case.bins) * 3
        return each * -(-(case.dim // 2) // how.group) + turn

    def back() -> Cost:
        slope = Cost(LATENCY / 2, BM * BN * case.item) + hidden(BN)
        if case.bins:
            total = turn + (through_memory(constants["N_RAW"], BN) + slope) * chunks[-1]
        else:
            total = turn + loop(chunks[-1], out * BN * case.item, dot(half, BN) * 2 + slope, stages)
        for i in range(len(layers) - 2, -1, -1):
            total += turn + (through_memory(layers[i + 1], BN) + slope) * chunks[i]
        return total + turn + through_memory(layers[0], half) + affine()

    coupling = numbers(0 if case.bins else BM * half, COUPLING * (2 if case.backward else 1), how)
    rows = Cost(LATENCY / 4, BM * case.dim * 4 * (3 if case.backward else 1))
    step = affine() + forward() + coupling + rows
    if case.backward:
        return step + back()
    return replace(step, clocks=_period(step.clocks, step.bytes, stages)) if whole else step


@cache
def clocks(case: Case, how: Launch) -> float:
    """Clocks of all steps for all rows."""
    step = program(case, how)
    programs = -(-case.rows // how.rows)
    threads = 32 * how.num_warps
    resident = max(1, min(REGISTERS // (255 * threads), SHARED // (shared_bytes(case, how) + RESERVED)))
    waves = math.ceil(programs / (PROCESSORS * resident))
    each = math.ceil(programs / PROCESSORS)  # programs of one multiprocessor
    busy = max(step.bytes / PORT, step.units, step.instructions / SCHEDULED)
    # Layers of the backward that stay for the products of weights go through memory.
    raw = shape(case)["N_RAW"] if case.bins else 0
    kept = case.rows * (sum(case.hidden) + raw) * 2 * case.item if case.backward else 0
    return case.steps * max(
        waves * step.clocks, each * busy, programs * step.bytes / L2, (kept + 12 * case.rows * case.dim) / MEMORY
    )


@cache
def shared_bytes(case: Case, how: Launch) -> int:
    """Bytes of shared memory of a program, at least: the tiles of its largest loop, and the rows that these multiply."""
    constants = shape(case)
    half: int = constants["HALF"]
    widest = max(b - a for a, b in zip(constants["COLUMNS"], constants["COLUMNS"][1:]))  # noqa: B905
    BM, BN, BK = how.rows, how.columns, how.depth
    staged, wide = how.staged or case.backward or case.bins > 0, warp_groups(how)
    # Warp groups multiply what lies in shared memory while it does, which takes one buffer more. They keep rows in registers.
    ahead = how.num_stages - (0 if wide and (case.precision == "bf16" or not staged) else 1)
    two_halves = min(BN, widest) * 2 * half
    if staged:
        columns = max(BN, how.group * case.bins)
        inner = ahead * (BK * columns + BM * BK) if widest > BK else 0
        out = ahead * two_halves if case.backward and widest > BN and not case.bins else 0
        mapped = (how.num_stages - 1) * (2 * half + BM) * BK * 4 if half > BK else 0
        return max(inner * case.item, out * case.item, mapped)
    if widest <= BN:  # the loop over steps: all that a step loads, with a context of one chunk
        context = (BM + widest) * BK
        return ahead * ((half * widest + widest * widest + two_halves + context) * case.item + 16 * half * half)
    rows = 0 if wide else BM * (widest + BN)
    return (ahead * (widest * BN + two_halves) + rows) * case.item
