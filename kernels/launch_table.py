"""How each flow kernel is launched: rows per program, chunks, warps, stages. Nothing is tuned at run time.

launch_table.json says how it was made: chosen by compiling (`tools/choose_launches.py`) or measured (`tools/tune_flow.py`).
Its keys are architecture, kernel, size class, operand precision and batch range.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glf_fast.kernels.spline import padded_bins

__all__ = [
    "FEW",
    "KERNELS",
    "PRECISIONS",
    "SIZES",
    "SPLINE_BINS",
    "Launch",
    "architecture",
    "entries",
    "key_for",
    "keys",
    "launch_for",
]

# Largest D and hidden width of a size class; a flow belongs to the first one that holds it.
SIZES = {"small": (32, 64), "medium": (64, 256), "large": (128, 512), "huge": (256, 512)}
# "deep" is the forward of three and four hidden layers; the backward stages its layers whatever their number.
KERNELS = ("forward", "deep", "backward")
PRECISIONS = ("bf16", "tf32", "tf32x3")
# Entries of spline flows, by the most numbers of one kind (widths, heights or slopes) of a spline. Kernels for 32 numbers spill
# at every launch (sm_90, Triton 3.6: 8 to 248 bytes). Only small spline flows have entries for many rows: the weights of medium
# ones take 1 MB a step, and backward tiles of more than 16 rows spill there, so that the programs would wait for L2.
# ops/coupling_flow/triton.py refuses flows that have no entry.
SPLINE_BINS = (8, 16)
# Rows up to which a batch is "few", by size class: tiles of 16 rows, as many programs as there can be. Beyond, larger tiles.
# A program's weights come through its multiprocessor's port to L2, 64 bytes a clock at most, and from an L2 that gives 3,100
# (H100). So from some 50 programs, 800 rows, on, those of wide flows share L2, and the time grows with the rows: at D 128,
# H 512, K 16 256 programs of 16 rows read 24 MB each, 1.1 ms. A tile of 64 rows reads them a quarter as often and takes about
# 1.6 times as long as one of 16 alone. Narrow flows wait for latencies, not for L2, and reach that point later.
# By arithmetic (tools/flow_costs.py), not measured.
FEW = {"small": 4096, "medium": 4096, "large": 2048, "huge": 2048}


class Launch(NamedTuple):
    """Rows of a program, columns of a chunk of a hidden layer, depth of a chunk of a product's sum; see mlp.py on `staged`."""

    rows: int
    columns: int
    depth: int
    staged: bool
    num_warps: int
    num_stages: int

    @property
    def group(self) -> int:
        """Transformed columns whose splines a program computes at once, one spline a thread.

        Two or more, so that a tile of 8 numbers each has the 16 columns of a product; 16 at most, to which they are packed.
        """
        return min(16, max(2, 32 * self.num_warps // self.rows))

    def constants(self) -> dict[str, Any]:
        """As the kernels' compile-time constants and launch options, but for `staged`."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": self.depth,
            "GROUP": self.group,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Chunks so small that small tests have several; 8 warps, so that a program is a wave.
INTERPRETED = Launch(16, 16, 16, staged=False, num_warps=8, num_stages=1)


@cache
def _table() -> dict[str, dict[str, Launch]]:
    table = json.loads(Path(__file__).with_name("launch_table.json").read_text(encoding="utf-8"))["launches"]
    return {arch: {key: Launch(*how) for key, how in launches.items()} for arch, launches in table.items()}


@cache
def architecture(index: int) -> str:
    """Which part of the table a GPU uses: consumer Blackwell has Ampere's matrix instructions and shared memory."""
    return {9: "90", 10: "100"}.get(torch.cuda.get_device_capability(index)[0], "80")


def keys() -> list[str]:
    """All keys of an architecture's part."""
    affine = itertools.product(KERNELS, SIZES, PRECISIONS, ("few", "many"))
    kernels = [f"{kernel}-splines{bins}" for kernel in ("forward", "backward") for bins in SPLINE_BINS]
    sizes = (("small", "few"), ("small", "many"), ("medium", "few"))
    of_splines = [(k, size, p, batch) for k, (size, batch), p in itertools.product(kernels, sizes, PRECISIONS)]
    return [" ".join(parts) for parts in [*affine, *of_splines]]


def key_for(
    backward: bool, dim: int, hidden: Sequence[int], precision: str, batch: int, spline: Sequence[float] = ()
) -> str:
    """The table's key of a flow of D columns and these hidden widths, for operands of this precision and a batch.

    `spline` begins with the number of bins and that of slopes less bins; it is empty for affine couplings.
    """
    size = next(name for name, (d, h) in SIZES.items() if dim <= d and max(hidden) <= h)
    kernel = "backward" if backward else "deep" if len(hidden) > 2 and not spline else "forward"
    if spline:
        bins, tails, *_ = map(int, spline)
        kernel += f"-splines{padded_bins(max(bins, bins + tails))}"
    return f"{kernel} {size} {precision} {'few' if batch <= FEW[size] else 'many'}"


def launch_for(
    backward: bool, dim: int, hidden: Sequence[int], precision: str, batch: int, device: torch.device,
    spline: Sequence[float] = (),
) -> Launch:  # fmt: skip
    """The launch of a flow, as in `key_for`, on a device."""
    if device.type == "cpu":
        return INTERPRETED._replace(staged=bool(spline) or len(hidden) > 2 or max(hidden) > 64)
    return _table()[architecture(device.index or 0)][key_for(backward, dim, hidden, precision, batch, spline)]


def entries(arch: int) -> Iterator[tuple[str, Launch]]:
    """The table's keys and launches for sm_`arch`."""
    yield from _table()[str(arch)].items()
