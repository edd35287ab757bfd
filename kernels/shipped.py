"""The kernels as they are shipped, one of each entry of the launch table: for the compile gate and the tuning script."""

from __future__ import annotations

from collections.abc import Iterator

from glf_fast.kernels import affine_coupling, coupling_flow, coupling_flow_backward
from glf_fast.kernels.flow_options import FULL_PRECISION, FlowOptions
from glf_fast.kernels.launch import Specialization
from glf_fast.kernels.launch_table import SIZES, Launch, entries

__all__ = ["shipped", "specialize"]


def specialize(key: str, how: Launch) -> Specialization:
    """The default flow (relu, tanh) of an entry's largest size: two hidden layers, "deep" ones four."""
    kernel, size, precision, _ = key.split()
    dim, width = SIZES[size]
    hidden = (width,) * (4 if kernel == "deep" else 2)
    # Operands in bf16 come with a map in full precision under autocast: of the two, the one that takes more registers.
    maps = FULL_PRECISION if precision == "bf16" else precision
    options = FlowOptions("relu", "tanh", 2.0, False, False, maps, precision)
    module = coupling_flow_backward if kernel == "backward" else coupling_flow
    return module.specialization(f"{key} BM {how.rows}", dim, hidden, 0, options, True, how)


def shipped(arch: int) -> Iterator[Specialization]:
    """All of them for sm_`arch`, and the elementwise coupling, which is launched alike everywhere."""
    for key, how in entries(arch):
        yield specialize(key, how)
    yield from affine_coupling.specializations()
