"""The launches that an entry of the launch table is chosen from, the most promising first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

from flow_costs import Case, clocks, shared_bytes

from glf_fast.kernels.launch_table import Launch

__all__ = ["MOST", "candidates", "case", "ranked", "shared_limit", "tuned_keys"]

# Bytes of shared memory that a program can have, and a multiprocessor has, by part of the table. "80" also serves sm_86, 89
# and 120, whose programs can have 99 KB; those of sm_80 could have 163.
SHARED = {"80": (99 << 10, 100 << 10), "90": (227 << 10, 228 << 10), "100": (227 << 10, 228 << 10)}
RESERVED = 1 << 10  # bytes of it that the driver takes for every program
MOST = 40  # launches of an entry that are measured
ACCUMULATORS = 160  # registers of a thread for tiles that stay; addresses and operands need the rest of 255

# D, hidden widths, and the rows of "few" and "many": the benchmarks' named flows, where there is one of the size.
FLOWS: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    "small": (20, (64, 64), 256, 65_536),  # glf-mnist
    "medium": (64, (256, 256), 256, 65_536),  # glf-cifar; throughput
    "large": (128, (512, 512), 256, 4_096),  # wide
    "huge": (256, (512, 512), 256, 4_096),
}
STEPS = 8
SPLINES = [f"{kernel}-splines{bins}" for bins in (8, 16) for kernel in ("forward", "backward")]


def tuned_keys() -> list[str]:
    """Keys that the benchmarks run, the most important first."""
    orders = (
        itertools.product(("few", "many"), ("medium", "small"), ("tf32", "bf16", "tf32x3"), ("forward", "backward")),
        itertools.product(("many",), ("large",), ("tf32", "bf16", "tf32x3"), ("forward", "backward")),
        itertools.product(("few",), ("small",), ("tf32", "bf16", "tf32x3"), SPLINES),
    )
    return [" ".join((kernel, size, precision, batch)) for batch, size, precision, kernel in itertools.chain(*orders)]


def case(key: str) -> Case:
    """The flow and the batch that a key's launches are compared with."""
    kernel, size, precision, batch = key.split()
    kernel, _, bins = kernel.partition("-splines")
    dim, hidden, few, many = FLOWS[size]
    if kernel == "deep":
        hidden += hidden
    rows = few if batch == "few" else many
    return Case(kernel == "backward", dim, hidden, STEPS, rows, precision, int(bins or 0))


def shared_limit(key: str, how: Launch, arch: str) -> int:
    """Bytes of shared memory that a program of a launch may take.

    Few rows are one program on a multiprocessor at most. Of many, two should be there at once, so that one multiplies while
    the other waits, where registers allow it: 8 warps take all of them.
    """
    program, processor = SHARED[arch]
    alone = key.endswith("few") or how.num_warps > 4
    return program if alone else min(program, processor // 2 - RESERVED)


@cache
def ranked(key: str, arch: str) -> list[Launch]:
    """All launches that fit, by predicted time."""
    flow = case(key)
    fitting = [
        how
        for how in _all(key)
        if shared_bytes(flow, how) <= shared_limit(key, how, arch) and _accumulators(flow, how) <= ACCUMULATORS
    ]
    # Of equals, those whose loops overlap loads and arithmetic come first, then those that take less.
    return sorted(
        fitting, key=lambda how: (round(clocks(flow, how)), how.num_stages == 2, how.num_stages, how.num_warps)
    )


def candidates(key: str, arch: str) -> list[Launch]:
    """The launches to measure."""
    return ranked(key, arch)[:MOST]


def _all(key: str) -> Iterator[Launch]:
    """Whatever a key's kernels could be launched with."""
    kernel, size, _, batch = key.split()
    dim, hidden, *_ = FLOWS[size]
    bins = case(key).bins
    rows = (16, 32) if batch == "few" else (16, 32, 64, 128)
    # Chunks are not longer than what they divide.
    columns = [n for n in (16, 32, 64, 128, 256) if n <= hidden[0]]
    depths = [n for n in (16, 32, 64, 128) if n <= hidden[0]]
    # The first hidden layer is kept in registers up to 256 columns: of 512, 16 rows take 256 registers of every thread.
    kept = (False, True) if kernel == "forward" and hidden[0] <= 256 else (True,)
    for BM, BN, BK, staged, warps, stages in itertools.product(rows, columns, depths, kept, (4, 8, 16), (2, 3, 4)):
        # Depths divide what passes through memory: staged layers, maps of more than 64 columns, and contexts. Of a context
        # alone, which no case here has, a short one should not be padded to a long chunk.
        divides = staged or dim > 64 or BK == 32
        # Without a loop over chunks, num_stages has nothing to divide in kernels with barriers.
        looped = not staged or bins > 0 or max(hidden) > min(BN, BK)
        if divides and (looped or stages == 3):
            yield Launch(BM, BN, BK, staged, warps, stages)


def _accumulators(flow: Case, how: Launch) -> float:
    """Registers of a thread that hold tiles from one product to the next, at least."""
    half = max(16, flow.dim // 2)
    numbers = how.rows * (how.columns + (6 if flow.backward else 4) * half)
    if not (how.staged or flow.backward):
        numbers += how.rows * flow.hidden[0] * flow.item // 4
    numbers += 3 * flow.bins * how.rows * how.group
    most = ACCUMULATORS if how.num_warps <= 8 else ACCUMULATORS / 2  # 16 warps share 65,536 registers, 128 a thread
    return numbers / (32 * how.num_warps) * ACCUMULATORS / most
