"""Kernels in the words of `triton.compile`, as their launchers in kernels/ start them: what the compile gate compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glf_fast.kernels import affine_coupling, autoregressive_packing, spline
from glf_fast.kernels import packing as packed
from glf_fast.kernels import sums as summed
from glf_fast.kernels.autoregressive_backward import autoregressive_backward_kernel
from glf_fast.kernels.autoregressive_flow import autoregressive_kernel, kernel_constants
from glf_fast.kernels.coupling_flow import flow_kernel
from glf_fast.kernels.coupling_flow_backward import flow_backward_kernel
from glf_fast.kernels.flow_options import FlowOptions, sizes
from glf_fast.kernels.launch_table import Launch
from glf_fast.reference import Spline

__all__ = [
    "Specialization",
    "autoregressive",
    "backward",
    "couplings",
    "forward",
    "masked_packing",
    "packing",
    "splines",
    "sums",
]


class Specialization(NamedTuple):
    """A kernel with the types of its arguments, its compile-time constants, and its launch options."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


def _signature(kernel: Any, constants: Mapping[str, Any], usual: str, others: Mapping[str, Any]) -> dict[str, Any]:
    """Types by argument: "constexpr" of the constants, the named `others`, and else the `usual` one."""
    types = {name: "constexpr" if name in constants else usual for name in (*constants, *kernel.arg_names)}
    return types | dict(others)


def forward(
    name: str, dim: int, hidden: Sequence[int], context_dim: int, options: FlowOptions, save: bool, how: Launch
) -> Specialization:
    """The kernel that `flow_forward` launches for float32 tensors, the packing apart."""
    shape = sizes(dim, hidden, context_dim, options.spline)
    constants = {**shape, **options.constants(), "SAVE": save, "STAGED": how.staged}
    return _flow(name, flow_kernel, constants, ("weights", "hidden"), ("density", "rows", "steps"), options, how)


def backward(
    name: str, dim: int, hidden: Sequence[int], context_dim: int, options: FlowOptions, saved: bool, how: Launch
) -> Specialization:
    """The kernel that `flow_backward` launches for float32 tensors, the packing and the sums apart."""
    shape = sizes(dim, hidden, context_dim, options.spline, backward=True)
    constants = {**shape, **options.constants(), "SAVED": saved}
    numbers = ("density", "more", "rows", "batch", "steps")
    return _flow(name, flow_backward_kernel, constants, ("weights", "hidden", "slopes"), numbers, options, how)


def _flow(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    kept: Sequence[str],
    numbers: Sequence[str],
    options: FlowOptions,
    how: Launch,
) -> Specialization:
    """A kernel of whole flows, some of whose tensors are `kept` in the type of the MLPs' operands."""
    constants |= how.constants()
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    others = dict.fromkeys(kept, _operands(options)) | dict.fromkeys(numbers, "i32")
    signature = _signature(kernel, constants, "*fp32", others)
    return Specialization(name, kernel, signature, constants, warps, stages)


def _operands(options: FlowOptions) -> str:
    return "*bf16" if options.mlp_precision == "bf16" else "*fp32"


def autoregressive(
    name: str, sizes: dict[str, Any], options: FlowOptions, backward: bool, save: bool, how: Launch
) -> Specialization:
    """The kernel that `autoregressive_forward` or `autoregressive_backward` launches for float32 tensors."""
    constants = kernel_constants(sizes, options, how)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    if not backward:
        constants["SAVE"] = save
    numbers = ("density", "rows", "steps", *(("batch",) if backward else ()))
    kept = ("weights", "hidden", *(("slopes",) if backward else ()))
    others = {"seen": "*i64"} | dict.fromkeys(kept, _operands(options)) | dict.fromkeys(numbers, "i32")
    kernel = autoregressive_backward_kernel if backward else autoregressive_kernel
    return Specialization(name, kernel, _signature(kernel, constants, "*fp32", others), constants, warps, stages)


def masked_packing(name: str, sizes: dict[str, Any], options: FlowOptions) -> Specialization:
    """The kernel that `pack_masked` launches for float32 tensors."""
    constants = autoregressive_packing.packing(sizes)
    sources = ("*fp32",) * (1 + max(part[0] for part in constants["PARTS"]))
    constants |= {"MAP": options.map_precision, "MLP": options.mlp_precision}
    others = {"sources": sources, "seen": "*i64", "weights": _operands(options)}
    kernel = autoregressive_packing.masked_pack_kernel
    return Specialization(name, kernel, _signature(kernel, constants, "*fp32", others), constants, 4, 1)


def packing(name: str, constants: dict[str, Any], maps: int, options: FlowOptions) -> Specialization:
    """The kernel that `pack` launches for float32 tensors."""
    layers = ("*fp32",) * (len(constants["HIDDEN"]) + 1)
    constants = {**constants, "BLOCKS": packed._blocks(constants, maps), "MAPS": maps}
    constants |= {"MAP": options.map_precision, "MLP": options.mlp_precision, "BLOCK": packed.BLOCK}
    others = {
        "weights": layers,
        "biases": layers,
        "packed_weights": _operands(options),
        "steps": "i32",
        "n_logs": "i32",
    }
    signature = _signature(packed.pack_kernel, constants, "*fp32", others)
    return Specialization(name, packed.pack_kernel, signature, constants, 4, 1)


def sums(name: str, sizes: dict[str, Any], kept: str) -> Specialization:
    """The kernel that sums gradients of a flow of these `sizes` in float32; its workspace is `kept`, "*bf16" or "*fp32"."""
    constants = {**summed._constants(sizes, True), "BM": summed.ROWS, "BN": summed.COLUMNS}
    totals = ("*fp32",) * len(constants["WIDTHS"])
    others = {"map_grad": "*fp32", "grad_logdet": "*fp32", "slopes": kept, "totals": totals}
    signature = _signature(summed.sums_kernel, constants, "i32", others)
    return Specialization(name, summed.sums_kernel, signature, constants, 4, 1)


def couplings() -> Iterator[Specialization]:
    """Kernels that are launched for float32 operands of vectors and of images in both orders, with the default log-scale.

    Channels of a half: 24 in large batches; 12 and 6, as in the first two levels of a Glow on 32 × 32 images, in small ones.
    Numbers must not be specialized: of those that are, the launcher would compile a kernel for multiples of 16, and one for 1.
    """
    formula = {"LOG_SCALE": "tanh", "CONSTANT": 2.0, "ADD_FIRST": False, "INVERSE": False}
    for name, shape, order in (
        ("vectors", (256, 32), torch.contiguous_format),
        ("images", (4096, 24, 16, 16), torch.contiguous_format),
        ("channels-last images", (4096, 24, 16, 16), torch.channels_last),
        ("few channels-last images", (64, 12, 16, 16), torch.channels_last),
        ("few channels-last images of 6", (64, 6, 16, 16), torch.channels_last),
    ):
        # Halves of one tensor, and a network's output, neither of which has memory on this device.
        twice = torch.empty((shape[0], 2 * shape[1], *shape[2:]), device="meta", memory_format=order)
        u, t = twice.chunk(2, 1)
        w, logdet, run_forward = affine_coupling._forward(t, u, t)
        _, run_backward = affine_coupling._backward(w, logdet, t, u, t)
        for direction, call in (("forward", run_forward), ("backward", run_backward)):
            constants = {**call.constants, **formula}
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            tensors = {
                argument: "*fp32"
                for argument, value in zip(call.kernel.arg_names, call.arguments, strict=False)
                if isinstance(value, Tensor)
            }
            signature = _signature(call.kernel, constants, "i32", tensors)
            yield Specialization(f"coupling {direction} {name}", call.kernel, signature, constants, warps, stages)


def splines() -> Iterator[Specialization]:
    """Kernels that are launched for float32 elements with 8 bins, and with the most bins, in short and in long rows."""
    for options, columns in (
        (Spline(8), 8),
        (Spline(8, tails="circular", parametrization="zuko"), 3),
        (Spline(10, tails="none", parametrization="nflows"), 200),
        (Spline(32, parametrization="zuko"), 200),
        (Spline(32, tails="none"), 8),
    ):
        x = torch.empty((4096, columns), device="meta")
        for direction, kernel, largest in (
            ("forward", spline.spline_kernel, spline.LARGEST),
            ("backward", spline.spline_backward_kernel, spline.WARP),
        ):
            for inverse in (False, True):
                _, _, constants = spline._launch(x, options.prepared().numbers(), inverse, largest)
                warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
                numbers = dict.fromkeys(("rows", "columns", "parts"), "i32")
                way = f"{direction} inverse" if inverse else direction
                name = f"spline {way} {options.parametrization} {options.bins} {options.tails}"
                signature = _signature(kernel, constants, "*fp32", numbers)
                yield Specialization(name, kernel, signature, constants, warps, stages)
