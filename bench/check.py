"""Nothing is timed that is not right: results in the same process against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import FlowCase
from bench.race import SEED, Job
from glf_fast import use_backend

__all__ = ["exact_flow", "operation", "why_wrong"]

CHUNK = 4096  # rows that float64 works on at a time

# torch's matmul precision → the largest relative error of results, and of gradients: there a ReLU that rounding switches
# counts, one row of 256 by some 10⁻³. What is wrong is off by much more; how exact kernels are is a matter of tests/.
LIMITS = {"highest": (1e-4, 1e-2), "high": (1e-2, 1e-1), "medium": (6e-2, 2.5e-1)}


def why_wrong(found: Sequence[Tensor], exact: Sequence[Tensor]) -> str:
    """Why what was found (one result, then gradients) is not what it should be, or "": in torch's present matmul precision."""
    if len(found) != len(exact):
        return f"{len(found)} results where there should be {len(exact)}"
    limits = LIMITS[torch.get_float32_matmul_precision()]
    for i, (ours, truth) in enumerate(zip(found, exact, strict=True)):
        if ours.shape != truth.shape:
            return f"result {i} has shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
        error = ((ours.double() - truth).norm() / truth.norm().clamp(min=1e-12)).item()
        if not error < limits[i > 0]:
            return f"result {i} is off by {error:.1e}"
    return ""


@cache
def exact_flow(case: FlowCase, mode: str, device: str = "cpu") -> list[Tensor]:
    """log_prob: [log p (B,)]; sample: [x (B, D)] from noise of the seed; train, step: [loss, its gradients]."""
    flow = case.flow(device).double()
    x, context = case.inputs(device)
    if mode == "sample":
        torch.manual_seed(SEED)
        x = torch.randn(case.batch, case.dim, device=device)
    contexts = [None] * case.batch if context is None else context.double().split(CHUNK)
    parts = zip(x.double().split(CHUNK), contexts, strict=False)
    with use_backend("reference"):
        if mode in ("log_prob", "sample"):
            with torch.no_grad():
                function = flow.log_prob if mode == "log_prob" else lambda z, c: flow.inverse(z, c)[0]
                return [torch.cat([function(rows, c) for rows, c in parts])]
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for rows, c in parts:
            part = -flow.log_prob(rows, c).sum() / case.batch
            part.backward()
            loss += part.detach()
    return [loss, *(p.grad for p in flow.parameters() if p.grad is not None)]


def operation(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    given: Sequence[Tensor],
    mode: str,
) -> Job:
    """Passes of a function: forward, inverse, or train, which is forward and backward from the `given` gradients.

    Results, or the gradients of the inputs, are compared with those of the reference in float64.
    """

    def results(f: Callable[..., Any], inputs: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        if mode == "train":
            return list(torch.autograd.grad(f(*inputs), inputs, given))
        with torch.no_grad():
            return list(f(*inputs, inverse=mode == "inverse"))

    def check(found: list[Tensor]) -> str:
        exact = [t.detach().double().requires_grad_() for t in inputs]
        return why_wrong(found, results(reference, exact, [g.double() for g in given]))

    return Job(partial(results, function, inputs, given), check, alone=True)
