"""The kernels as they are shipped: for the compile gate and the tuning script.

Of every entry of the launch table the largest flow that it serves, whose padding masks all fall away; and for sm_90, on which
they are benchmarked, everything that users of the named flows run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import specialization
import torch
from specialization import Specialization

from glf_fast.kernels import spline as splines
from glf_fast.kernels.autoregressive_flow import launch_of
from glf_fast.kernels.autoregressive_packing import autoregressive_sizes
from glf_fast.kernels.flow_options import FULL_PRECISION, FlowOptions, sizes
from glf_fast.kernels.launch_table import SIZES, Launch, entries, key_for
from glf_fast.reference import Spline

__all__ = ["AUTOREGRESSIVE", "FLOWS", "beside", "kernels", "of_entry", "shipped", "spline_constants"]

# D, hidden widths, context, rows, bins of splines: those of bench/cases.py. K does not occur in a kernel, so the memory case
# (K = 64, 4,096 rows) runs those of glf-cifar.
FLOWS = {
    "sbi": (8, (50, 50), 16, 200, 0),
    "glf-mnist": (20, (64, 64), 0, 256, 0),
    "glf-cifar": (64, (256, 256), 0, 256, 0),
    "throughput": (64, (256, 256), 0, 65_536, 0),
    "wide": (128, (512, 512), 0, 4_096, 0),
    "splines": (20, (64, 64), 0, 256, 8),
    "sbi-splines": (8, (50, 50), 16, 200, 10),
}
# The same of autoregressive flows, with activation, log-scale and whether the context has its own layer: sbi's default, one of
# splines, and a wide one.
AUTOREGRESSIVE = {
    "sbi-maf": ((10, (50, 50, 50), 16, 200, 0), ("tanh", "softplus", True)),
    "sbi-maf-splines": ((10, (50, 50), 16, 200, 10), ("tanh", "tanh", True)),
    "maf-wide": ((32, (128, 128), 0, 200, 0), ("relu", "tanh", False)),
}
# torch's matmul precision → operands of the affine maps, of the MLPs.
OPERANDS = {"highest": (FULL_PRECISION, FULL_PRECISION), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}


def spline_constants(bins: int, parametrization: str = "madnis") -> tuple[Any, ...]:
    """The kernels' constants of splines with linear tails; empty where there are no bins."""
    return splines.constants(Spline(bins, parametrization=parametrization).prepared().numbers()) if bins else ()


def of_entry(key: str, how: Launch) -> Specialization:
    """The default flow (relu, tanh) of an entry's largest size: two hidden layers, "deep" ones four."""
    kernel, size, precision, _ = key.split()
    kernel, _, bins = kernel.partition("-splines")
    dim, width = SIZES[size]
    hidden = (width,) * (4 if kernel == "deep" else 2)
    # Operands in bf16 come with a map in full precision under autocast: of the two, the one that takes more registers.
    maps = FULL_PRECISION if precision == "bf16" else precision
    options = FlowOptions(
        "relu", "tanh", 2.0, False, False, maps, precision, spline_constants(int(bins or 0), "nflows")
    )
    make = specialization.backward if kernel == "backward" else specialization.forward
    return make(key, dim, hidden, 0, options, True, how)


def of_flows(key: str, how: Launch) -> Iterator[Specialization]:
    """All kernels of the named flows that an entry launches: both directions, with what they save or without."""
    backward = key.startswith("backward")
    make = specialization.backward if backward else specialization.forward
    for name, (dim, hidden, context_dim, rows, bins) in FLOWS.items():
        spline = spline_constants(bins)
        for precision, (maps, mlp) in OPERANDS.items():
            if key_for(backward, dim, hidden, mlp, rows, spline) != key:
                continue
            for inverse in (True, False):
                options = FlowOptions("relu", "tanh", 2.0, False, inverse, maps, mlp, spline)
                direction = ("backward of " if backward else "") + ("inverse" if inverse else "forward")
                for saved in (True, False):
                    memory = "saved" if saved else "reversible" if backward else "alone"
                    what = f"{name} {precision} {direction}, {memory}"
                    yield make(what, dim, hidden, context_dim, options, saved, how)


def kernels(key: str, how: Launch, arch: int) -> Iterator[Specialization]:
    """What one entry of sm_`arch`'s launch table launches."""
    if arch == 90:
        yield from of_flows(key, how)
    yield of_entry(key, how)


def beside() -> Iterator[Specialization]:
    """Kernels that have no launch to choose: those that pack the named flows' parameters and sum their gradients."""
    for name, (dim, hidden, context_dim, _, bins) in FLOWS.items():
        constants = sizes(dim, hidden, context_dim, spline_constants(bins), backward=True)
        for precision, (maps, mlp) in OPERANDS.items():
            options = FlowOptions("relu", "tanh", 2.0, False, False, maps, mlp)
            for stacks in (1, 2):
                yield specialization.packing(f"{name} {precision} packing, {stacks} maps", constants, stacks, options)
        for kept in ("*fp32", "*bf16"):
            yield specialization.sums(f"{name} sums of {kept[1:]}", constants, kept)
    yield from autoregressive()
    yield from specialization.couplings()
    yield from specialization.splines()


def autoregressive() -> Iterator[Specialization]:
    """Kernels of autoregressive flows: of sbi's default all, of the others those of torch's "high" precision.

    Their launches are not chosen by compiling, but written down (`launch_of`).
    """
    for name, ((dim, hidden, context_dim, _, bins), (activation, log_scale, own)) in AUTOREGRESSIVE.items():
        spline = spline_constants(bins)
        sizes = autoregressive_sizes(dim, hidden, context_dim, own, spline)
        for precision, operands in OPERANDS.items():
            if name != "sbi-maf" and precision != "high":
                continue
            options = FlowOptions(activation, log_scale, 2.0, False, False, *operands, spline)
            yield specialization.masked_packing(f"{name} {precision} packing", sizes, options)
            for inverse, backward in itertools.product((False, True), (False, True)):
                launches = {launch_of(inverse, backward, rows, torch.device("cuda")): rows for rows in (10**6, 1)}
                direction = ("backward of " if backward else "") + ("inverse" if inverse else "forward")
                for how, rows in launches.items():
                    what = f"{name} {precision} {direction}, {'few' if rows == 1 else 'many'}"
                    given = options._replace(inverse=inverse)
                    yield specialization.autoregressive(what, sizes, given, backward, True, how)


def shipped(arch: int) -> Iterator[tuple[str, Specialization]]:
    """All of them for sm_`arch`, by the keys of their launches, or "" where there is none."""
    for key, how in entries(arch):
        for spec in kernels(key, how, arch):
            yield key, spec
    for spec in beside():
        yield "", spec
