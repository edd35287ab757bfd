"""The parameters of an autoregressive flow as its kernels read them: masked, padded, rounded once. One launch for all K steps.

A step's matrices and vectors lie behind one another, as those of coupling flows do (packing.py):

    maps     (K, ⌈D⌉, ⌈D⌉)      A, or A⁻¹
    weights  (K, WEIGHTS[-1])   W₀ [⌈D⌉, ⌈n₁⌉], …, W_out [⌈n⌉, ⌈P·D⌉]; with a context, what it is multiplied with [⌈C⌉, ⌈n₁⌉]
    vectors  (K, VECTORS[-1])   c [⌈D⌉], b₁ [⌈n₁⌉], …, b_out [⌈P·D⌉]; with a layer of the context, its own [⌈n₁⌉]

⌈n⌉ is n rounded up to a multiple of 64, the longest chunk of a launch: no tile of a weight needs a mask, wherever the masks
of the network let it begin and end. Weights beyond the fan-in become zeros, and are not read.

The numbers of a feature lie side by side, P of them: [u, t], or all widths of its spline, then the heights, then the slopes,
each kind padded with zeros to a power of two (`padded_bins`). Their gradients have the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.flow_options import FlowOptions, operand_dtype
from glf_fast.kernels.launch import launch
from glf_fast.kernels.spline import BINS, TAILS, padded_bins
from glf_fast.kernels.tiles import COMPILED, round_tf32

__all__ = ["MaskedPacked", "autoregressive_sizes", "masked_pack_kernel", "pack_masked", "packing", "up", "used_numbers"]

BLOCK = 1024 if COMPILED else 16384  # numbers of a program
# Places in a `_Part`, for kernels.
SOURCE, SIZE, SKIPPED, ROWS, COLUMNS, SEEN, FEATURES, TARGET, START = (tl.constexpr(i) for i in range(9))


class MaskedPacked(NamedTuple):
    """See above."""

    maps: Tensor
    weights: Tensor
    vectors: Tensor


def autoregressive_sizes(
    dim: int, hidden: Sequence[int], context_dim: int, context_layer: bool, spline: tuple[Any, ...] = ()
) -> dict[str, Any]:
    """Compile-time sizes of an autoregressive flow's kernels.

    NUMBERS: P. COLUMNS: where each hidden layer starts in a row of them, that of the context behind the others, and where the
    last one ends. ROW_STRIDE: numbers from one row to the next in the backward's workspace, where [context, y], or the P·D
    gradients of the last layer's numbers, follow the hidden layers. WORK: the same for rows of the state, which are y, another
    D numbers, and what the context adds to the first layer. WEIGHTS and VECTORS: see above. SEEN: where each layer's part of
    the fan-in starts.
    """
    numbers = 2
    if spline:
        bins, tails, *_ = spline
        numbers = 2 * padded_bins(bins) + padded_bins(bins + tails)
    # A tile of up to 16 features needs no mask.
    widths = [up(dim), *map(up, hidden), up(up(dim, 16) * numbers)]
    matrices = [n * m for n, m in pairwise(widths)] + [up(context_dim) * widths[1]] * (context_dim > 0)
    columns = (0, *accumulate(up(n, 16) for n in (*hidden, *hidden[: int(context_layer)])))
    return {
        "D": dim,
        "C": context_dim,
        "CONTEXT_LAYER": context_layer,
        "HIDDEN": tuple(hidden),
        "NUMBERS": numbers,
        "COLUMNS": columns,
        "ROW_STRIDE": columns[-1] + up(max(numbers * dim, context_dim + dim), 16),
        "WORK": up(2 * dim + (hidden[0] if context_dim else 0), 16),
        "WEIGHTS": (0, *accumulate(matrices)),
        "VECTORS": (0, *accumulate(widths + widths[1:2] * context_layer)),
        "SEEN": (0, *accumulate((*hidden, dim))),
        "SPLINE": spline,
    }


@triton.constexpr_function
def up(n, step=64):
    """⌈n⌉, or n rounded up to another step."""
    return (n + step - 1) // step * step


def used_numbers(of_features: Tensor, sizes: dict[str, Any]) -> Tensor:
    """(…, n·D) of (…, P·D): the numbers that a network makes, without the padding between them."""
    if not sizes["SPLINE"]:
        return of_features
    bins, tails, *_ = sizes["SPLINE"]
    kinds = ((0, bins), (padded_bins(bins), bins), (2 * padded_bins(bins), bins + tails))
    parts = of_features.unflatten(-1, (-1, sizes["NUMBERS"]))
    return torch.cat([parts[..., at : at + n] for at, n in kinds], -1).flatten(-2)


class _Part(NamedTuple):
    """A matrix of a step: where it is in its source, what it is, and where it goes."""

    source: int  # its place among the sources
    size: int  # numbers of the source's step, of which `skipped` come before it
    skipped: int
    rows: int
    columns: int
    seen: int  # where the fan-in of its units begins; −1 where all is seen
    features: bool  # whether its columns are the numbers of features
    target: int  # 0: maps, 1: weights, 2: vectors
    start: int  # in a step of the target


def packing(sizes: dict[str, Any]) -> dict[str, Any]:
    """Compile-time constants of `masked_pack_kernel`, its precisions apart.

    PARTS: what is packed, as `_Part`s; WIDTHS and PACKED: numbers of a packed row of each, and of all of it; BLOCKS: where,
    among a step's blocks, each part's begin, and how many there are; STEPS: numbers of a step of each target, and of the
    fan-in.
    """
    dim, context, own, hidden = (sizes[name] for name in ("D", "C", "CONTEXT_LAYER", "HIDDEN"))
    layers = len(hidden) + 1
    n_raw = (3 * sizes["SPLINE"][0] + sizes["SPLINE"][1] if sizes["SPLINE"] else 2) * dim
    columns = [*hidden, n_raw]
    of_weights = 2  # the sources: matrix, offset, weights, biases
    of_biases = of_weights + layers + own
    parts = [_Part(0, dim * dim, 0, dim, dim, -1, False, 0, 0)]
    for i, (rows, n) in enumerate(zip((dim, *hidden), columns, strict=True)):
        before = context if i == 0 and not own else 0
        seen, last = sizes["SEEN"][i], i + 1 == layers
        parts.append(
            _Part(of_weights + i, (before + rows) * n, before * n, rows, n, seen, last, 1, sizes["WEIGHTS"][i])
        )
        parts.append(_Part(of_biases + i, n, 0, 1, n, -1, last, 2, sizes["VECTORS"][i + 1]))
    parts.append(_Part(1, dim, 0, 1, dim, -1, False, 2, 0))
    n = hidden[0]
    if context:
        source, size = (of_weights + layers, context * n) if own else (of_weights, (context + dim) * n)
        parts.append(_Part(source, size, 0, context, n, -1, False, 1, sizes["WEIGHTS"][layers]))
    if own:
        parts.append(_Part(of_biases + layers, n, 0, 1, n, -1, False, 2, sizes["VECTORS"][layers + 1]))
    widths = [up(up(dim, 16) * sizes["NUMBERS"] if part.features else part.columns) for part in parts]
    packed = [width * (1 if part.target == 2 else up(part.rows)) for part, width in zip(parts, widths, strict=True)]
    return {
        "D": dim,
        "NUMBERS": sizes["NUMBERS"],
        "SPLINE": sizes["SPLINE"],
        "PARTS": tuple(map(tuple, parts)),
        "WIDTHS": tuple(widths),
        "PACKED": tuple(packed),
        "BLOCKS": (0, *accumulate(triton.cdiv(n, BLOCK) for n in packed)),
        "STEPS": (up(dim) ** 2, sizes["WEIGHTS"][-1], sizes["VECTORS"][-1], sizes["SEEN"][-1]),
        "BLOCK": BLOCK,
    }


@triton.jit
def pack_part(
    source, target, seen, block, P: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, NUMBERS_PACKED: tl.constexpr,
    D: tl.constexpr, NUMBERS: tl.constexpr, SPLINE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of part P, which is packed to rows of WIDTH and NUMBERS_PACKED numbers in all.

    It takes all parts, because Triton 3.6 passes no tuple that lies in another one.
    """
    at = block * BLOCK + tl.arange(0, BLOCK)
    i = at // WIDTH
    unit = at % WIDTH
    column = unit
    exists = i < PARTS[P][ROWS]
    if PARTS[P][FEATURES]:
        number = unit % NUMBERS
        unit = unit // NUMBERS
        exists &= unit < D
        column = unit * (PARTS[P][COLUMNS] // D) + number
        if len(SPLINE) > 0:
            K: tl.constexpr = SPLINE[BINS]
            B: tl.constexpr = padded_bins(K)
            kind = tl.minimum(number // B, 2)  # widths, heights, slopes
            exists &= number - kind * B < tl.where(kind == 2, K + SPLINE[TAILS], K)
            column += kind * (K - B)
    else:
        exists &= unit < PARTS[P][COLUMNS]
    if PARTS[P][SEEN] >= 0:
        exists &= i < tl.load(seen + PARTS[P][SEEN] + unit, mask=exists, other=0)
    w = tl.load(source + PARTS[P][SKIPPED] + i * PARTS[P][COLUMNS] + column, mask=exists, other=0.0)
    if COMPILED and PRECISION == "tf32":
        w = round_tf32(w)
    tl.store(target + PARTS[P][START] + at, w.to(target.dtype.element_ty), mask=at < NUMBERS_PACKED)


@triton.jit
def masked_pack_kernel(
    sources, seen, maps, weights, vectors, D: tl.constexpr, NUMBERS: tl.constexpr, SPLINE: tl.constexpr,
    PARTS: tl.constexpr, WIDTHS: tl.constexpr, PACKED: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr,
    MAP: tl.constexpr, MLP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a block of one part of one step. The constants are those of `packing`."""
    one = tl.full([], 1, tl.int64)
    k = tl.program_id(0) // BLOCKS[len(PARTS)] * one
    block = tl.program_id(0) % BLOCKS[len(PARTS)]
    seen += k * STEPS[3]
    for p in tl.static_range(len(PARTS)):
        if block >= BLOCKS[p] and block < BLOCKS[p + 1]:
            source = sources[PARTS[p][SOURCE]] + k * PARTS[p][SIZE]
            here = block - BLOCKS[p]
            if PARTS[p][TARGET] == 0:
                to = maps + k * STEPS[0]
                pack_part(source, to, seen, here, p, PARTS, WIDTHS[p], PACKED[p], D, NUMBERS, SPLINE, MAP, BLOCK)
            elif PARTS[p][TARGET] == 1:
                to = weights + k * STEPS[1]
                pack_part(source, to, seen, here, p, PARTS, WIDTHS[p], PACKED[p], D, NUMBERS, SPLINE, MLP, BLOCK)
            else:
                to = vectors + k * STEPS[2]
                pack_part(source, to, seen, here, p, PARTS, WIDTHS[p], PACKED[p], D, NUMBERS, SPLINE, "ieee", BLOCK)


def pack_masked(
    matrix: Tensor,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    seen: Tensor,
    sizes: dict[str, Any],
    options: FlowOptions,
) -> MaskedPacked:
    """The parameters of a flow's K steps for its kernels. One launch.

    Contiguous tensors on one device, those of the flow of one dtype; `seen` (K, SEEN[-1]) int64 is the fan-in.
    """
    steps, constants = len(matrix), packing(sizes)
    square, n_weights, n_vectors, _ = constants["STEPS"]
    maps = offset.new_empty(steps, square)
    packed = offset.new_empty((steps, n_weights), dtype=operand_dtype(offset, options))
    vectors = offset.new_empty((steps, n_vectors))
    launch(
        masked_pack_kernel, steps * constants["BLOCKS"][-1], offset,
        (matrix, offset, *weights, *biases), seen, maps, packed, vectors,
        **constants, MAP=options.map_precision, MLP=options.mlp_precision, num_warps=4,
    )  # fmt: skip
    return MaskedPacked(maps, packed, vectors)
