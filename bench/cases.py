"""The flows that are measured, by name, and what the arithmetic and the memory traffic of a pass cost at least."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from glf_fast import CouplingFlow

__all__ = ["FLOWS", "MODES", "SMALL_BATCH", "FlowCase"]

# log_prob and sample without gradients; train: log_prob's mean, forward and backward; step: train, and Adam.
MODES = ("log_prob", "sample", "train", "step")


@dataclass(frozen=True)
class FlowCase:
    """A coupling flow of K = `steps` steps at batch size B."""

    name: str
    dim: int
    hidden: tuple[int, ...]
    steps: int
    batch: int
    context_dim: int = 0

    def flow(self, device: str = "cpu") -> CouplingFlow:
        """A flow of this size, as after its data-dependent start, with parameters a little off their initial values."""
        torch.manual_seed(0)
        flow = CouplingFlow(self.dim, self.steps, self.hidden, self.context_dim)
        flow(torch.randn(256, self.dim), torch.randn(256, self.context_dim) if self.context_dim else None)
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.01 * torch.randn_like(p))
        return flow.to(device)

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor | None]:
        """x (B, D) and the context (B, C), or None."""
        torch.manual_seed(1)
        x = torch.randn(self.batch, self.dim)
        context = torch.randn(self.batch, self.context_dim).to(device) if self.context_dim else None
        return x.to(device), context

    @property
    def weights(self) -> int:
        """Numbers in all matrices: one multiply-add of each per row and pass."""
        transformed = self.dim // 2
        widths = [self.dim - transformed + self.context_dim, *self.hidden, 2 * transformed]
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


FLOWS = {
    case.name: case
    for case in (
        FlowCase("glf-mnist", 20, (64, 64), 8, 256),
        FlowCase("glf-cifar", 64, (256, 256), 8, 256),
        FlowCase("sbi", 8, (50, 50), 5, 200, context_dim=16),
        FlowCase("throughput", 64, (256, 256), 8, 65536),
        FlowCase("wide", 128, (512, 512), 16, 4096),
    )
}
SMALL_BATCH = {f"small-batch-{b}": FlowCase(f"small-batch-{b}", 64, (256, 256), 8, b) for b in (1, 16, 64)}
