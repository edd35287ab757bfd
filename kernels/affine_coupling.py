"""The elementwise affine coupling and its log-determinant in one launch: for couplings with any conditioner.

Rows are samples. A sample's elements are `size` numbers in runs of N: one run where they lie in one piece, a run of channels
per pixel in channels-last images; rows and runs may lie apart, as the halves of a split and the chunks of one network's
output do. Bound by memory: three numbers read and one written forward, four read and three written backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.coupling_flow import couple
from glf_fast.kernels.launch import Specialization, launch
from glf_fast.kernels.math import log_scale, log_scale_slope

__all__ = [
    "coupling_backward",
    "coupling_backward_kernel",
    "coupling_forward",
    "coupling_kernel",
    "is_channels_last",
    "specializations",
]

# Elements that a program has in flight: 4 warps, 8 numbers of each operand a thread, two 16-byte loads.
TILE = 1024


@triton.jit
def places(element, run, N: tl.constexpr):
    """Where a sample's elements are, `run` numbers from one run of N to the next; N = 0: all in one run."""
    return (element // N) * run + element % N if N > 0 else element


@triton.jit(do_not_specialize=["rows"])
def coupling_kernel(
    v, u, t, w, logdet, v_row, u_row, t_row, v_run, u_run, t_run, rows, size,
    N: tl.constexpr, LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr, ADD_FIRST: tl.constexpr, INVERSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: BM samples, BN elements at a time. w lies in one piece, in the order of v."""
    sample = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    live = sample < rows
    state: tl.constexpr = w.dtype.element_ty
    total = tl.zeros((BM, BN), state)  # [BM, BN], summed over columns once at the end
    for start in range(0, size, BN):
        element = start + tl.arange(0, BN)[None, :]  # [1, BN]
        mask = live & (element < size)
        v_ = tl.load(v + sample * v_row + places(element, v_run, N), mask=mask, other=0.0).to(state)  # [BM, BN]
        u_ = tl.load(u + sample * u_row + places(element, u_run, N), mask=mask, other=0.0).to(state)
        t_ = tl.load(t + sample * t_row + places(element, t_run, N), mask=mask, other=0.0).to(state)
        ell = log_scale(u_, LOG_SCALE, CONSTANT)
        if INVERSE:
            ell = -ell
        tl.store(w + sample * size + element, couple(v_, t_, tl.exp(ell), ADD_FIRST, INVERSE), mask=mask)
        total += tl.where(mask, ell, 0.0)
    tl.store(logdet + sample, tl.sum(total, 1)[:, None], mask=live)


@triton.jit(do_not_specialize=["rows"])
def coupling_backward_kernel(
    grad_w, grad_logdet, v, u, t, grad_v, grad_u, grad_t, w_row, v_row, u_row, t_row, w_run, v_run, u_run, t_run,
    rows, size,
    N: tl.constexpr, LOG_SCALE: tl.constexpr, CONSTANT: tl.constexpr, ADD_FIRST: tl.constexpr, INVERSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """∂v, ∂u, ∂t, each in one piece, in the order of v. With s = e^ℓ (INVERSE: e^−ℓ) and g = ∂w:

    forward  ∂v = g·s,  ∂t = g (ADD_FIRST: g·s),   ∂ℓ = g·s·v (ADD_FIRST: g·s·(v + t)) + ∂logdet
    INVERSE  ∂v = g·s,  ∂t = −g·s (ADD_FIRST: −g), ∂ℓ = −g·s·(v − t) (ADD_FIRST: −g·s·v) − ∂logdet
    """
    sample = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    live = sample < rows
    state: tl.constexpr = grad_w.dtype.element_ty
    g_logdet = tl.load(grad_logdet + sample, mask=live, other=0.0)  # [BM, 1]
    for start in range(0, size, BN):
        element = start + tl.arange(0, BN)[None, :]  # [1, BN]
        mask = live & (element < size)
        g = tl.load(grad_w + sample * w_row + places(element, w_run, N), mask=mask, other=0.0)  # [BM, BN]
        v_ = tl.load(v + sample * v_row + places(element, v_run, N), mask=mask, other=0.0).to(state)
        u_ = tl.load(u + sample * u_row + places(element, u_run, N), mask=mask, other=0.0).to(state)
        t_ = tl.load(t + sample * t_row + places(element, t_run, N), mask=mask, other=0.0).to(state)
        ell = log_scale(u_, LOG_SCALE, CONSTANT)
        if INVERSE:
            g_v = g * tl.exp(-ell)
            g_t = -g if ADD_FIRST else -g_v
            g_ell = -g_v * (v_ if ADD_FIRST else v_ - t_) - g_logdet
        else:
            g_v = g * tl.exp(ell)
            g_t = g_v if ADD_FIRST else g
            g_ell = g_v * (v_ + t_ if ADD_FIRST else v_) + g_logdet
        at = sample * size + element
        tl.store(grad_v + at, g_v.to(grad_v.dtype.element_ty), mask=mask)
        tl.store(grad_u + at, (g_ell * log_scale_slope(u_, LOG_SCALE, CONSTANT)).to(grad_u.dtype.element_ty), mask=mask)
        tl.store(grad_t + at, g_t.to(grad_t.dtype.element_ty), mask=mask)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of an image batch (B, C, H, W) lie next to each other, and its pixels do not."""
    return x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1


def coupling_forward(
    v: Tensor, u: Tensor, t: Tensor, name: str, constant: float, add_first: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """w, in v's order of memory, and logdet (B,), in float32 or v's float64; v, u, t (B, …) of any strides and precision.

    Arguments as in `glf_fast.reference.affine_coupling`, the constant as kernels take it (ln m for softclip). One launch,
    and a copy of an operand whose rows are in neither of the two orders.
    """
    last = is_channels_last(v)
    dtype = torch.promote_types(v.dtype, torch.float32)
    w = torch.empty(v.shape, dtype=dtype, device=v.device, memory_format=_format(last))
    logdet = torch.empty(len(v), dtype=dtype, device=v.device)
    operands = [_readable(x, last) for x in (v, u, t)]
    size, constants = _shape(v, last)
    launch(
        coupling_kernel, triton.cdiv(len(v), constants["BM"]) if size else 0, v, *operands, w, logdet,
        *_strides(operands, last), len(v), size,
        LOG_SCALE=name, CONSTANT=constant, ADD_FIRST=add_first, INVERSE=inverse, **constants,
    )  # fmt: skip
    return w, logdet if size else logdet.zero_()


def coupling_backward(
    grad_w: Tensor, grad_logdet: Tensor, v: Tensor, u: Tensor, t: Tensor, name: str, constant: float, add_first: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """∂v, ∂u, ∂t, each in the precision of its operand and in v's order of memory. One launch."""
    last = is_channels_last(v)
    results = [torch.empty(v.shape, dtype=x.dtype, device=v.device, memory_format=_format(last)) for x in (v, u, t)]
    operands = [_readable(x, last) for x in (grad_w, v, u, t)]
    size, constants = _shape(v, last)
    launch(
        coupling_backward_kernel, triton.cdiv(len(v), constants["BM"]) if size else 0, v,
        operands[0], grad_logdet.contiguous(), *operands[1:], *results, *_strides(operands, last), len(v), size,
        LOG_SCALE=name, CONSTANT=constant, ADD_FIRST=add_first, INVERSE=inverse, **constants,
    )  # fmt: skip
    return results[0], results[1], results[2]


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


def _shape(v: Tensor, last: bool) -> tuple[int, dict[str, Any]]:
    """Elements of a sample, and the sizes that the kernels know at compile time: short samples share a program."""
    size = v[0].numel() if len(v) else 0
    columns = min(TILE, max(16, triton.next_power_of_2(size)))
    return size, {
        "N": v.shape[1] if last else 0,
        "BM": TILE // columns,
        "BN": columns,
        "num_warps": 4,
        "num_stages": 1,
    }


def _strides(operands: list[Tensor], last: bool) -> tuple[int, ...]:
    """Distances between rows, then between runs."""
    # An image of one column has its runs in the rows.
    return (*(x.stride(0) for x in operands), *(x.stride(3 if x.shape[3] > 1 else 2) if last else 0 for x in operands))


def specializations() -> list[Specialization]:
    """What is launched for float32 operands of vectors and of images in both orders, with the default log-scale."""
    found = []
    for kernel, name in ((coupling_kernel, "forward"), (coupling_backward_kernel, "backward")):
        for shape, channels, columns in (("vectors", 0, 32), ("images", 0, TILE), ("channels-last images", 24, TILE)):
            constants = {
                "N": channels, "LOG_SCALE": "tanh", "CONSTANT": 2.0, "ADD_FIRST": False, "INVERSE": False,
                "BM": TILE // columns, "BN": columns,
            }  # fmt: skip
            signature: dict[str, Any] = dict.fromkeys(constants, "constexpr")
            for argument in kernel.arg_names:
                number = argument in ("rows", "size") or argument.endswith(("_row", "_run"))
                signature.setdefault(argument, "i32" if number else "*fp32")
            found.append(Specialization(f"coupling {name} {shape}", kernel, signature, constants, 4, 1))
    return found
