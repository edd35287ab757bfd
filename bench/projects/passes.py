"""A project's flow before and after `accelerate`, and the passes over both that are timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench.projects.project import TRUE_SIZE, Project, Sizes
from glf_fast import accelerate
from glf_fast.conversion.accelerate import Report

__all__ = ["MODES", "Pair", "pair_of", "passes"]

MODES = ("step", "fused step", "log_prob", "sample")
TOLERANCE = 1e-3  # of log_prob in float32, of flows that are far from their data


@dataclass(frozen=True)
class Pair:
    """An original flow and its accelerated copy, both in evaluation mode.

    seconds: what `accelerate` took.
    """

    flows: dict[str, nn.Module]
    report: Report
    seconds: float

    @property
    def into(self) -> dict[str, int]:
        """The kinds of layers that a flow's have become, in all runs together, and how many have stayed."""
        total: dict[str, int] = {}
        for replaced in self.report.replaced:
            for kind, number in replaced.into.items():
                total[kind] = total.get(kind, 0) + number
        return {**{kind: number for kind, number in total.items() if number}, "left": len(self.report.left)}


def pair_of(project: Project, sizes: Sizes = TRUE_SIZE) -> Pair | None:
    """Both flows on the processor, or None of a flow that stays.

    Raises:
        RuntimeError: the flow is not replaced though it should be, or has another log_prob afterwards.
    """
    original = project.made(sizes)
    fast = copy.deepcopy(original)
    start = time.perf_counter()
    report = accelerate(fast)
    seconds = time.perf_counter() - start
    if not report:
        if project.why:
            return None
        raise RuntimeError(f"{project.name} is not replaced: {report}")
    flows = {"original": original.eval(), "glf_fast": fast.eval()}
    x, context = project.inputs(project.batch)
    with torch.no_grad():
        wanted, got = (project.log_prob(flow, x, context) for flow in flows.values())
    # Densities that the original does not have are none of ours, too.
    size = max(1.0, wanted.nan_to_num().abs().max().item())
    if not torch.allclose(got, wanted, rtol=TOLERANCE, atol=TOLERANCE * size, equal_nan=True):
        raise RuntimeError(f"{project.name} has another log_prob: {(got - wanted).abs().max():.3g} off")
    return Pair(flows, report, seconds)


def passes(project: Project, flow: nn.Module, mode: str) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The pass that is timed in a mode, which is one of `MODES`: a function of a batch and its contexts.

    It returns the loss of the step, log p, or the samples. Steps are so short that the flow stays what it was.
    """
    if not mode.endswith("step"):
        return torch.no_grad()(
            partial(project.log_prob, flow)
            if mode == "log_prob"
            else lambda x, context: project.sample(flow, len(x), context)
        )
    parameters = [p for p in flow.train().parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 1e-6, fused=True if mode == "fused step" else None)

    def step(x: Tensor, context: Tensor | None) -> Tensor:
        optimizer.zero_grad()
        loss = project.loss_of(flow, x, context)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
