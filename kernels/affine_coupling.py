"""The elementwise affine coupling and its log-determinant in one launch: for couplings with any conditioner.

Rows are samples. A sample's elements are numbers in runs of N: one run where they lie in one piece, a run of channels per
pixel in channels-last images. Rows and runs may lie apart, as the halves of a split and the chunks of one network's output do.
Bound by memory: three numbers read and one written forward, four read and three written backward.

Distances are counted in units of UNIT numbers, the largest power of two up to `LARGEST_UNIT` that divides them all and the
operands' addresses. Triton's launcher tells the compiler of multiples of 16 alone: with it, channels-last images with 12 or 24
channels of a half were read number by number, 24 loads a thread instead of 6. So nothing is left to the launcher.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.coupling_flow import couple
from glf_fast.kernels.launch import launch
from glf_fast.kernels.math import log_scale, log_scale_slope

__all__ = [
    "coupling_backward",
    "coupling_backward_kernel",
    "coupling_forward",
    "coupling_kernel",
    "is_channels_last",
]

# 16 bytes of float32, the widest load. Of 16-bit operands 8 numbers would be 16 bytes, but in another order of threads than
# the float32 ones: the compiler then exchanges them through shared memory, with two barriers.
LARGEST_UNIT = 4
# Elements of a thread: one load of each operand, so that all loads are made at once. Of two each, ptxas (of Triton 3.6 and 3.9,
# for sm_90) made the last one or two after the arithmetic of the first, and waited once more. 32 registers: full occupancy.
THREAD = 4
# Elements of a program.
TILE = 1024
# The forward adds up a sample's ℓ, so a sample has one program, and few samples must have larger tiles, of up to 32 warps. A
# GPU that reads 4.3 TB/s (an H200; an H100 3.0) and waits 700 ns for a number has 3.0 MB in flight: 2¹⁸ elements of three
# float32 operands. With tiles of 4,096, 64 images have that, and the 12 × 16 × 16 elements of an image are read at once, not in
# three turns.
LARGEST_TILE = 4096
IN_FLIGHT = 1 << 18
# Where samples are fewer than 64, several programs share one if that saves this many turns of 1.1 µs (700 ns, and 48 KB at 64
# bytes a clock): three times what the second launch takes in a graph, which adds up their sums.
TURNS_SAVED = 6


@triton.jit
def pointers(base, sample, row, element, run, N: tl.constexpr, UNIT: tl.constexpr):
    """To elements of samples [BM, BN]. Samples are `row` units apart, runs of N elements `run` units; N = 0: all in one run."""
    place = (element // N) * run * UNIT + element % N if N > 0 else element
    BYTES: tl.constexpr = UNIT * base.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(base + (sample * row * UNIT + place), (1, BYTES))


@triton.jit(do_not_specialize=range(15))
def coupling_kernel(
    v, u, t, w, logdet, v_row, u_row, t_row, v_run, u_run, t_run, rows, size, parts, turns,
    N: tl.constexpr, UNIT: tl.constexpr, LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr, ADD_FIRST: tl.constexpr,
    INVERSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: one part of BM samples, `turns` times BN elements. w lies in one piece, in the order of v.

    logdet [rows, parts]. Distances and `size`, the elements of a sample, are in units.
    """
    part = tl.program_id(0) % parts
    sample = (tl.program_id(0) // parts).to(tl.int64) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    live = sample < rows
    state: tl.constexpr = w.dtype.element_ty
    total = tl.zeros((BM, BN), state)  # [BM, BN], summed over columns once at the end
    for turn in range(turns):
        element = (part * turns + turn) * BN + tl.arange(0, BN)[None, :]  # [1, BN]
        mask = live & (element < size * UNIT)
        v_ = tl.load(pointers(v, sample, v_row, element, v_run, N, UNIT), mask=mask, other=0.0).to(state)  # [BM, BN]
        u_ = tl.load(pointers(u, sample, u_row, element, u_run, N, UNIT), mask=mask, other=0.0).to(state)
        t_ = tl.load(pointers(t, sample, t_row, element, t_run, N, UNIT), mask=mask, other=0.0).to(state)
        ell = log_scale(u_, LOG_SCALE, CONSTANT)
        if INVERSE:
            ell = -ell
        w_ = couple(v_, t_, tl.exp(ell), ADD_FIRST, INVERSE)
        tl.store(pointers(w, sample, size, element, 0, 0, UNIT), w_, mask=mask)
        total += tl.where(mask, ell, 0.0)
    tl.store(logdet + sample * parts + part, tl.sum(total, 1)[:, None], mask=live)


@triton.jit(do_not_specialize=range(19))
def coupling_backward_kernel(
    grad_w, grad_logdet, v, u, t, grad_v, grad_u, grad_t, w_row, v_row, u_row, t_row, w_run, v_run, u_run, t_run,
    rows, size, parts,
    N: tl.constexpr, UNIT: tl.constexpr, LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr, ADD_FIRST: tl.constexpr,
    INVERSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: BN elements of BM samples. ∂v, ∂u, ∂t, each in one piece, in the order of v.

    With s = e^ℓ (INVERSE: e^−ℓ) and g = ∂w:
    forward  ∂v = g·s,  ∂t = g (ADD_FIRST: g·s),   ∂ℓ = g·s·v (ADD_FIRST: g·s·(v + t)) + ∂logdet
    INVERSE  ∂v = g·s,  ∂t = −g·s (ADD_FIRST: −g), ∂ℓ = −g·s·(v − t) (ADD_FIRST: −g·s·v) − ∂logdet
    """
    element = tl.program_id(0) % parts * BN + tl.arange(0, BN)[None, :]  # [1, BN]
    sample = (tl.program_id(0) // parts).to(tl.int64) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    mask = (sample < rows) & (element < size * UNIT)
    state: tl.constexpr = grad_w.dtype.element_ty
    g_logdet = tl.load(grad_logdet + sample, mask=sample < rows, other=0.0)  # [BM, 1]
    g = tl.load(pointers(grad_w, sample, w_row, element, w_run, N, UNIT), mask=mask, other=0.0)  # [BM, BN]
    v_ = tl.load(pointers(v, sample, v_row, element, v_run, N, UNIT), mask=mask, other=0.0).to(state)
    u_ = tl.load(pointers(u, sample, u_row, element, u_run, N, UNIT), mask=mask, other=0.0).to(state)
    t_ = tl.load(pointers(t, sample, t_row, element, t_run, N, UNIT), mask=mask, other=0.0).to(state)
    ell = log_scale(u_, LOG_SCALE, CONSTANT)
    if INVERSE:
        g_v = g * tl.exp(-ell)
        g_t = -g if ADD_FIRST else -g_v
        g_ell = -g_v * (v_ if ADD_FIRST else v_ - t_) - g_logdet
    else:
        g_v = g * tl.exp(ell)
        g_t = g_v if ADD_FIRST else g
        g_ell = g_v * (v_ + t_ if ADD_FIRST else v_) + g_logdet
    g_u = g_ell * log_scale_slope(u_, LOG_SCALE, CONSTANT)
    tl.store(pointers(grad_v, sample, size, element, 0, 0, UNIT), g_v.to(grad_v.dtype.element_ty), mask=mask)
    tl.store(pointers(grad_u, sample, size, element, 0, 0, UNIT), g_u.to(grad_u.dtype.element_ty), mask=mask)
    tl.store(pointers(grad_t, sample, size, element, 0, 0, UNIT), g_t.to(grad_t.dtype.element_ty), mask=mask)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of an image batch (B, C, H, W) lie next to each other, and its pixels do not."""
    return x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1


class _Call(NamedTuple):
    """What `launch` is given, but for the formula."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def coupling_forward(
    v: Tensor, u: Tensor, t: Tensor, name: str, constant: float, add_first: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """w, in v's order of memory, and logdet (B,), in float32 or v's float64; v, u, t (B, …) of any strides and precision.

    Arguments as in `glf_fast.reference.affine_coupling`, the constant as kernels take it (ln m for softclip). One launch,
    a second one where several programs share a sample, and a copy of an operand whose rows are in neither of the two orders.
    """
    w, logdet, call = _forward(v, u, t)
    launch(
        call.kernel, call.programs, v, *call.arguments, **call.constants,
        LOG_SCALE=name, CONSTANT=constant, ADD_FIRST=add_first, INVERSE=inverse,
    )  # fmt: skip
    if v.numel() == 0:
        logdet.zero_()
    return w, logdet if logdet.ndim == 1 else logdet.sum(1)


def coupling_backward(
    grad_w: Tensor, grad_logdet: Tensor, v: Tensor, u: Tensor, t: Tensor, name: str, constant: float, add_first: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """∂v, ∂u, ∂t, each in the precision of its operand and in v's order of memory. One launch."""
    results, call = _backward(grad_w, grad_logdet, v, u, t)
    launch(
        call.kernel, call.programs, v, *call.arguments, **call.constants,
        LOG_SCALE=name, CONSTANT=constant, ADD_FIRST=add_first, INVERSE=inverse,
    )  # fmt: skip
    return results


def _forward(v: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor, _Call]:
    """w and logdet, (B,) or of samples that several programs share (B, programs of a sample), and what computes them."""
    last, rows, elements = is_channels_last(v), len(v), math.prod(v.shape[1:])
    operands = [_readable(x, last) for x in (v, u, t)]
    layout, distances = _layout(operands, last)
    columns = _columns(elements, max(TILE, triton.next_power_of_2(IN_FLIGHT // max(rows, 1))))
    turns = triton.cdiv(elements, columns)
    shared = triton.cdiv(turns, max(1, min(turns, IN_FLIGHT // (LARGEST_TILE * max(rows, 1)))))
    if turns - shared >= TURNS_SAVED:
        turns = shared
    parts = triton.cdiv(elements, turns * columns) if elements else 1
    dtype = torch.promote_types(v.dtype, torch.float32)
    w = torch.empty(v.shape, dtype=dtype, device=v.device, memory_format=_format(last))
    logdet = torch.empty((rows, parts) if parts > 1 else rows, dtype=dtype, device=v.device)
    constants = layout | _tile(columns)
    programs = triton.cdiv(rows, constants["BM"]) * parts if elements else 0
    arguments = (*operands, w, logdet, *distances, rows, elements // layout["UNIT"], parts, turns)
    return w, logdet, _Call(coupling_kernel, programs, arguments, constants)


def _backward(
    grad_w: Tensor, grad_logdet: Tensor, v: Tensor, u: Tensor, t: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], _Call]:
    """∂v, ∂u, ∂t, and what computes them. No program needs another's results: a tile each."""
    last, rows, elements = is_channels_last(v), len(v), math.prod(v.shape[1:])
    operands = [_readable(x, last) for x in (grad_w, v, u, t)]
    layout, distances = _layout(operands, last)
    columns = _columns(elements, TILE)
    parts = triton.cdiv(elements, columns)
    grad_v, grad_u, grad_t = (
        torch.empty(v.shape, dtype=x.dtype, device=v.device, memory_format=_format(last)) for x in (v, u, t)
    )
    constants = layout | _tile(columns)
    arguments = (
        operands[0], grad_logdet.contiguous(), *operands[1:], grad_v, grad_u, grad_t,
        *distances, rows, elements // layout["UNIT"], parts,
    )  # fmt: skip
    programs = triton.cdiv(rows, constants["BM"]) * parts
    return (grad_v, grad_u, grad_t), _Call(coupling_backward_kernel, programs, arguments, constants)


def _format(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def _readable(x: Tensor, last: bool) -> Tensor:
    """x itself where each row (of channels-last images: each run of channels, at equal distances) is in one piece.

    Else a copy. `contiguous` would hand back x where it only seems to fit: torch ignores strides of dimensions of size 1.
    """
    if last:
        fits = x.stride(1) == 1 and (min(x.shape[2:]) == 1 or x.stride(2) == x.stride(3) * x.shape[3])
    else:
        fits = len(x) == 0 or x[0].is_contiguous()
    return x if fits else x.clone(memory_format=_format(last))


def _layout(operands: list[Tensor], last: bool) -> tuple[dict[str, int], list[int]]:
    """N and UNIT; distances between rows, then between runs, in units."""
    channels = operands[0].shape[1] if last else 0
    rows = [x.stride(0) for x in operands]
    # An image of one column has its runs in the rows.
    runs = [x.stride(3 if x.shape[3] > 1 else 2) if last else 0 for x in operands]
    addresses = (x.data_ptr() // x.element_size() for x in operands)
    elements = math.prod(operands[0].shape[1:])
    unit = math.gcd(LARGEST_UNIT, channels, elements, *rows, *runs, *addresses)
    return {"N": channels, "UNIT": unit}, [distance // unit for distance in (*rows, *runs)]


def _columns(elements: int, tile: int) -> int:
    """BN for samples of so many elements."""
    return min(tile, LARGEST_TILE, max(16, triton.next_power_of_2(elements)))


def _tile(columns: int) -> dict[str, int]:
    """A program's samples, of which short ones share it, and warps."""
    samples = max(1, TILE // columns)
    return {"BM": samples, "BN": columns, "num_warps": samples * columns // 128, "num_stages": 1}
