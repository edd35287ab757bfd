"""Cases by name, with the arithmetic and the memory traffic that a pass needs at least."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glf_fast import AutoregressiveFlow, CouplingFlow, Spline

__all__ = [
    "COUPLINGS",
    "COUPLING_MODES",
    "DEPTH",
    "FIT_EPOCHS",
    "FIT_ROWS",
    "FLOWS",
    "FLOWS_BY_NAME",
    "GLOW",
    "GRID",
    "MASKED",
    "MODES",
    "SMALL_BATCH",
    "SPLINES",
    "AutoregressiveCase",
    "CouplingCase",
    "FlowCase",
    "ImageCase",
    "SplineCase",
    "Unrated",
]

# log_prob and sample without gradients; train: log_prob's mean, forward and backward; step: train, and Adam.
MODES = ("log_prob", "sample", "train", "step")
# fit: a run of training of so many epochs over so many rows, see bench.fitting.
FIT_ROWS, FIT_EPOCHS = 10_000, 10
# forward and inverse without gradients; train: forward and backward.
COUPLING_MODES = ("forward", "inverse", "train")


class Unrated:
    """A case whose least work is not known."""

    def operations(self, mode: str) -> int:
        """Nothing to compare with."""
        return 0

    def bytes(self, mode: str) -> int:
        """Nothing to compare with."""
        return 0


@dataclass(frozen=True)
class FlowCase:
    """A coupling flow of K = `steps` steps at batch size B: affine, or with `bins` of rational-quadratic splines."""

    name: str
    dim: int
    hidden: tuple[int, ...]
    steps: int
    batch: int
    context_dim: int = 0
    bins: int = 0

    def flow(self, device: str = "cpu") -> CouplingFlow:
        """A flow of this size, as after its data-dependent start, with parameters a little off their initial values.

        The deeper the flow, the less: as far off as at 8 steps, 64 amplify rounding until float32 has no digit left.
        """
        torch.manual_seed(0)
        coupling, spline = ("spline", Spline(self.bins)) if self.bins else ("affine", None)
        flow = CouplingFlow(self.dim, self.steps, self.hidden, self.context_dim, coupling=coupling, spline=spline)
        flow(torch.randn(256, self.dim), torch.randn(256, self.context_dim) if self.context_dim else None)
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.01 * min(1.0, 8 / self.steps) * torch.randn_like(p))
        return flow.to(device)

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor | None]:
        """x (B, D) and the context (B, C), or None.

        Wider than what the flow started from and off its middle: at the minimum of the loss gradients are small
        differences of large numbers, and one ReLU that rounding switches changes them by 10⁻³.
        """
        torch.manual_seed(1)
        x = 0.5 + 1.5 * torch.randn(self.batch, self.dim)
        context = torch.randn(self.batch, self.context_dim).to(device) if self.context_dim else None
        return x.to(device), context

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": self.batch, "dim": self.dim, "hidden": self.hidden, "steps": self.steps, "bins": self.bins}

    @property
    def weights(self) -> int:
        """Numbers in all matrices: one multiply-add of each per row and pass."""
        transformed = self.dim // 2
        columns = Spline(self.bins).columns if self.bins else 2
        widths = [self.dim - transformed + self.context_dim, *self.hidden, columns * transformed]
        mlp = sum(a * b for a, b in itertools.pairwise(widths))
        return self.steps * (self.dim**2 + mlp)

    def operations(self, mode: str) -> int:
        """Floating-point operations of the matrix products: forward, and twice as much backward."""
        passes = 1 if mode in ("log_prob", "sample") else 3
        return 2 * passes * self.batch * self.weights

    def bytes(self, mode: str) -> int:
        """Least traffic in float32: weights and rows read once, results written once; gradients and Adam's state likewise."""
        rows = self.batch * (2 * self.dim + self.context_dim + 1)
        traffic = {"log_prob": 1, "sample": 1, "train": 3, "step": 3 + 6}[mode] * self.weights
        return 4 * (traffic + (1 if mode in ("log_prob", "sample") else 2) * rows)


@dataclass(frozen=True)
class AutoregressiveCase(FlowCase):
    """A masked autoregressive flow of nflows' kind: tanh, softplus scales, the context by a layer of its own."""

    def flow(self, device: str = "cpu") -> AutoregressiveFlow:  # type: ignore[override]
        """A flow of this size, with parameters a little off their initial values."""
        torch.manual_seed(0)
        flow = AutoregressiveFlow(
            self.dim,
            self.steps,
            self.hidden,
            self.context_dim,
            log_scale="softplus",
            context_layer=True,
            linear="permutation",
        )
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.01 * torch.randn_like(p))
        return flow.to(device)

    @property
    def weights(self) -> int:
        """Numbers in all matrices that are not masked: half of the networks'."""
        made = sum(a * b for a, b in itertools.pairwise([self.dim, *self.hidden, 2 * self.dim])) // 2
        return self.steps * (made + self.context_dim * self.hidden[0])


@dataclass(frozen=True)
class CouplingCase:
    """The elementwise affine coupling of images (B, C, H, W): u and t are the halves of one network's output."""

    shape: tuple[int, int, int, int]
    order: str  # "contiguous" or "channels-last"

    @property
    def name(self) -> str:
        """Shape and order."""
        return f"{'x'.join(map(str, self.shape))} {self.order}"

    def inputs(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """v, u, t (B, C, H, W), which ask for gradients."""
        order = torch.channels_last if self.order == "channels-last" else torch.contiguous_format
        torch.manual_seed(seed)
        B, C, H, W = self.shape
        v = torch.randn(B, C, H, W).to(device, memory_format=order)
        u, t = torch.randn(B, 2 * C, H, W).to(device, memory_format=order).chunk(2, 1)
        return v.requires_grad_(), u.detach().requires_grad_(), t.detach().requires_grad_()

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": self.shape[0]}

    def operations(self, mode: str) -> int:
        """None that count: the yardstick is a copy."""
        return 0

    def bytes(self, mode: str) -> int:
        """Least traffic in float32: v, u, t read, w written; backward ∂w, v, u, t read and three gradients written."""
        B, C, H, W = self.shape
        return 4 * {"forward": 4, "inverse": 4, "train": 11}[mode] * B * C * H * W


@dataclass(frozen=True)
class SplineCase:
    """Rational-quadratic splines of numbers x (B, D), each with its own parameters; the box is [-5, 5], with linear tails."""

    batch: int
    dim: int
    bins: int

    @property
    def name(self) -> str:
        """Shape and bins."""
        return f"{self.batch}x{self.dim}-{self.bins}-bins"

    @property
    def columns(self) -> int:
        """Parameters of one spline."""
        return Spline(self.bins).columns

    def inputs(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
        """x (B, D), one in 80 of it outside the box, and parameters (B, D, n), which ask for gradients."""
        torch.manual_seed(seed)
        x, parameters = 2 * torch.randn(self.batch, self.dim), torch.randn(self.batch, self.dim, self.columns)
        return x.to(device).requires_grad_(), parameters.to(device).requires_grad_()

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": self.batch}

    def operations(self, mode: str) -> int:
        """None that count: the yardstick is a copy."""
        return 0

    def bytes(self, mode: str) -> int:
        """Least traffic in float32: x and parameters read, y and log y' written; backward ∂y, ∂log y', x and parameters read
        and two gradients written."""
        numbers = 3 + self.columns
        return 4 * (numbers if mode != "train" else 2 * numbers + 1 + self.columns) * self.batch * self.dim


@dataclass(frozen=True)
class ImageCase:
    """K = `steps` steps of Glow on images (C, H, W), with convolutional networks of that width, at batch size B."""

    name: str
    shape: tuple[int, int, int]
    width: int
    steps: int
    batch: int

    def inputs(self, device: str = "cpu") -> tuple[Tensor, None]:
        """x (B, C, H, W), and no context."""
        torch.manual_seed(1)
        return (0.5 + 1.5 * torch.randn(self.batch, *self.shape)).to(device), None


GLOW = ImageCase("glow-12x16x16", (12, 16, 16), 64, 8, 32)
FLOWS = {
    case.name: case
    for case in (
        FlowCase("glf-mnist", 20, (64, 64), 8, 256),
        FlowCase("glf-cifar", 64, (256, 256), 8, 256),
        FlowCase("sbi", 8, (50, 50), 5, 200, context_dim=16),
        FlowCase("throughput", 64, (256, 256), 8, 65536),
        FlowCase("wide", 128, (512, 512), 16, 4096),
        FlowCase("splines", 20, (64, 64), 8, 256, bins=8),
        FlowCase("sbi-splines", 8, (50, 50), 5, 200, context_dim=16, bins=10),
    )
}
SMALL_BATCH = {f"small-batch-{b}": FlowCase(f"small-batch-{b}", 64, (256, 256), 8, b) for b in (1, 16, 64)}
# glf-cifar with more and fewer steps.
DEPTH = {f"depth-{k}": FlowCase(f"depth-{k}", 64, (256, 256), k, 256) for k in (2, 4, 8, 16, 32, 64)}
# Batch against width: is a GPU worth it? K = 8, two hidden layers.
GRID = {
    f"grid-{d}-{h}-{b}": FlowCase(f"grid-{d}-{h}-{b}", d, (h, h), 8, b)
    for d, h in ((4, 32), (16, 64), (64, 256), (128, 512))
    for b in (1, 16, 64, 256, 1024, 4096)
}
# The sizes of sbi's default, maf: its training batch, and as many posterior samples as its tutorials draw.
MASKED = {
    name: AutoregressiveCase(name, 10, (50, 50, 50), 5, batch, context_dim=16)
    for name, batch in (("sbi-maf", 200), ("sbi-maf-10000", 10_000))
}
FLOWS_BY_NAME = FLOWS | SMALL_BATCH | DEPTH | GRID | MASKED
COUPLINGS = [
    CouplingCase(shape, order)
    for shape in ((64, 12, 16, 16), (64, 24, 8, 8), (64, 48, 4, 4))
    for order in ("contiguous", "channels-last")
]
SPLINES = [SplineCase(4096, 8, 8)]
