"""Flows as jobs: ours, the same in plain PyTorch and under torch.compile, and flows of the same size in other libraries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import glf_fast
from bench.cases import FlowCase, ImageCase
from bench.check import exact_flow, why_wrong
from bench.compiler import compiled
from bench.elsewhere import Elsewhere
from bench.libraries import LIBRARIES, Density, Library, flowjax
from bench.race import Clock, Job, Provider

__all__ = ["ALONE", "COMPILED", "FLOWJAX", "GRAPHED_STEP", "PROVIDERS", "Flow", "flow_job", "library_flow"]

COMPILED = ("compile", "reduce-overhead")
GRAPHED_STEP = "glf_fast, GraphedStep"
# Whose kernels are timed alone, too: a compiled flow's are those of reduce-overhead, whose own graphs nobody else can replay.
ALONE = ("glf_fast", "eager", "compile")


class Flow:
    """A density with its optimizer, under one of our backends where it is ours."""

    def __init__(self, density: Density, device: str, backend: str | None = None) -> None:
        self.module, self.log_prob, self.sample = density
        self.module.to(device)
        self.backend = backend
        # Steps so short that what is timed stays what was checked; capturable where a graph may hold it.
        parameters, on_gpu = self.module.parameters(), device != "cpu"
        self.optimizer = torch.optim.Adam(parameters, lr=1e-9, fused=True, capturable=on_gpu)

    def run(self, mode: str, x: Tensor, context: Tensor | None) -> Tensor:
        """One pass of `mode` over the rows x; returns what a user would look at."""
        with glf_fast.use_backend(self.backend) if self.backend else nullcontext():
            if mode == "log_prob":
                with torch.no_grad():
                    return self.log_prob(x, context)
            if mode == "sample":
                with torch.no_grad():
                    return self.sample(len(x), context)
            for p in self.module.parameters():
                p.grad = None
            loss = -self.log_prob(x, context).mean()
            loss.backward()
            if mode == "step":
                self.optimizer.step()
            return loss.detach()

    def results(self, mode: str, out: Tensor) -> list[Tensor]:
        """The output of a pass, and the gradients that it left."""
        gradients = (p.grad for p in self.module.parameters() if mode in ("train", "step"))
        return [out, *(g for g in gradients if g is not None)]

    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    def job(self, mode: str, case: FlowCase | ImageCase, device: str, check: Callable[[Tensor], str]) -> Job:
        """Passes over a case's inputs."""
        x, context = case.inputs(device)
        info = {"parameters": self.parameters()}
        if mode == "sample":  # samples need no data
            return Job(partial(self.run, mode, x), check, (context,), info)
        return Job(partial(self.run, mode), check, (x, context), info)


def flow_job(name: str, make: Callable[[FlowCase, str], Density], case: FlowCase, mode: str, clock: Clock) -> Job:
    """Our flow's passes, whose values and gradients are checked."""
    device = clock.DEVICE
    torch.manual_seed(0)
    ours = name == "glf_fast"
    flow = Flow(make(case, device), device, "auto" if ours else "reference")
    # As a user would have it: evaluation mode without gradients, so that what can be kept between calls is kept.
    # Eager and compiled PyTorch assemble their matrices at each call, as every library does.
    flow.module.train(mode in ("train", "step") or not ours)

    def check(out: Tensor) -> str:
        exact = exact_flow(case, "train" if mode == "step" else mode, device)
        return why_wrong(flow.results(mode, out), exact)

    job = flow.job(mode, case, device, check)
    if name == "reduce-overhead":
        call = job.call

        def marked(*inputs: Tensor | None) -> object:
            torch.compiler.cudagraph_mark_step_begin()  # what the last pass returned may be overwritten
            assert call
            return call(*inputs)

        job.call, job.in_graph = marked, True
    job.alone = name in ALONE
    return job


def _ours(case: FlowCase, device: str) -> Density:
    flow = case.flow(device)
    return Density(flow, flow.log_prob, flow.sample)


def _compile(mode: str | None, case: FlowCase, device: str) -> Density:
    flow = case.flow(device)
    log_prob = compiled(flow.log_prob, mode)
    inverse = compiled(flow.inverse, mode)

    def sample(n: int, context: Tensor | None) -> Tensor:
        return inverse(torch.randn(n, case.dim, device=device), context)[0]

    return Density(flow, log_prob, sample)


def library_flow(library: Library, case: FlowCase, mode: str, device: str) -> Flow:
    """A library's flow, its data-dependent start done, which a single row would spoil.

    Raises:
        AssertionError: it is not of our flow's size: as many parameters within 10 %.
    """
    torch.manual_seed(0)
    flow = Flow(library.flow(case, device), device)
    flow.run("log_prob", *replace(case, batch=256).inputs(device))
    flow.module.train(mode in ("train", "step"))
    # Of the two square matrices that hold L and U only the strict triangles count.
    ours = sum(p.numel() for p in case.flow().parameters()) - case.steps * case.dim * (case.dim + 1)
    if abs(flow.parameters() / ours - 1) > 0.1:
        raise AssertionError(
            f"{library.name} has {flow.parameters()} parameters where we have {ours}: not the same flow"
        )
    return flow


def _library_job(library: Library, case: FlowCase, mode: str, clock: Clock) -> Job:
    """Passes of a library's flow, checked for shapes and finite values alone."""
    shape = {"log_prob": (case.batch,), "sample": (case.batch, case.dim)}.get(mode, ())

    def check(out: Tensor) -> str:
        right = out.shape == shape and out.isfinite().all()
        return "" if right else f"{tuple(out.shape)}, or not all finite"

    return library_flow(library, case, mode, clock.DEVICE).job(mode, case, clock.DEVICE, check)


def _library(library: Library) -> Provider:
    return Provider(library.name, partial(_library_job, library), lambda case, mode, device: library.why_not(case))


def _flowjax_job(case: FlowCase, mode: str, clock: Clock) -> Job:
    process = Elsewhere("flowjax", case.name, mode)
    process.wait()
    return Job(None, lambda _: "", bursts=process)


def _why_not_flowjax(case: FlowCase, mode: str, device: str) -> str:
    return flowjax.why_not() or ("" if device == "cpu" else "jax is compared on a processor")


def _graphed_step_job(case: FlowCase, mode: str, clock: Clock) -> Job:
    """Our flow's training steps by `GraphedStep`, which gathers the rows of a batch, too."""
    device = clock.DEVICE
    torch.manual_seed(0)
    flow = Flow(_ours(case, device), device, "auto")
    flow.module.train()
    optimizer = torch.optim.AdamW(flow.module.parameters(), lr=1e-9, weight_decay=0.0, fused=True)
    step = glf_fast.GraphedStep(flow.module, optimizer, *case.inputs(device))  # type: ignore[arg-type]
    rows = torch.arange(case.batch, device=device)

    def check(out: Tensor) -> str:
        return why_wrong(flow.results(mode, out), exact_flow(case, "train", device))

    return Job(step, check, (rows,), {"parameters": flow.parameters()}, in_graph=not step.why_not)


def _why_no_graphed_step(case: FlowCase, mode: str, device: str) -> str:
    return "" if mode == "step" else "GraphedStep makes whole training steps"


FLOWJAX = Provider("flowjax", _flowjax_job, _why_not_flowjax)
MAKERS: dict[str, Callable[[FlowCase, str], Density]] = {
    "glf_fast": _ours,
    "eager": _ours,
    "compile": partial(_compile, None),
    "reduce-overhead": partial(_compile, "reduce-overhead"),
}
PROVIDERS: dict[str, Provider] = {
    **{name: Provider(name, partial(flow_job, name, make)) for name, make in MAKERS.items()},
    **{library.name: _library(library) for library in LIBRARIES.values()},
    GRAPHED_STEP: Provider(GRAPHED_STEP, _graphed_step_job, _why_no_graphed_step),
    "flowjax": FLOWJAX,
}
