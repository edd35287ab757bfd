"""Options and precisions of the GPU's whole-flow kernels, as torch's settings ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from glf_fast.kernels.flow_options import FlowOptions

__all__ = ["autocast_on", "kernel_options"]


def autocast_on(device: str) -> str:
    """The dtype that torch.autocast asks for on this type of device now: "bf16", "fp16", or "" where it is off."""
    if not torch.is_autocast_enabled(device):
        return ""
    return "bf16" if torch.get_autocast_dtype(device) == torch.bfloat16 else "fp16"


def kernel_options(
    x: Tensor, names: tuple[str, str, float, bool, bool], spline: list[float], autocast: str, activation_constant: float
) -> FlowOptions:
    """Names and precisions. Read here, not in Python that torch.compile traces: it cannot read the matmul precision.

    The affine maps stay at tf32 or better, because a bf16 A would not match its A⁻¹. Under a float16 autocast the
    conditioner's products are tf32, which has float16's mantissa and float32's range.
    """
    from glf_fast.kernels.flow_options import FULL_PRECISION, FlowOptions
    from glf_fast.kernels.spline import constants

    made = constants(spline) if spline else ()
    if x.dtype == torch.float64:
        return FlowOptions(*names, "ieee", "ieee", made, activation_constant)
    setting = torch.get_float32_matmul_precision()
    maps = FULL_PRECISION if setting == "highest" else "tf32"
    mlps = {"": "bf16" if setting == "medium" else maps, "bf16": "bf16", "fp16": "tf32"}[autocast]
    return FlowOptions(*names, maps, mlps, made, activation_constant)
