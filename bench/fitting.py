"""Whole runs of training as users start them: `glf_fast.fit`, flowjax's `fit_to_data`, and the usual loop in PyTorch.

A call is a run of so many epochs over rows, a tenth of which is held out: a new order in each epoch, the losses of all batches,
the loss on the rows held out after each epoch, and the best weights kept. flowjax has compiled its step before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import glf_fast
from bench.cases import FIT_EPOCHS, FIT_ROWS, FLOWS_BY_NAME, FlowCase, Unrated
from bench.elsewhere import Elsewhere
from bench.flows import library_flow
from bench.libraries import LIBRARIES, Density, Library, flowjax
from bench.race import Clock, Job, Provider

__all__ = ["PROVIDERS", "FitCase", "loop"]

HELD_OUT, RATE = 0.1, 1e-9  # so slow that every call does the same


@dataclass(frozen=True)
class FitCase(Unrated):
    """A run of a flow of `FLOWS_BY_NAME` at its batch size."""

    name: str
    rows: int = FIT_ROWS
    epochs: int = FIT_EPOCHS

    @property
    def flow(self) -> FlowCase:
        """The flow's size."""
        return FLOWS_BY_NAME[self.name]

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return self.flow.sizes | {"rows": self.rows, "epochs": self.epochs}

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """All rows."""
        return replace(self.flow, batch=self.rows).inputs()


def fused(case: FitCase, flow: glf_fast.Flow) -> list[float]:
    """The validation losses of a run by `glf_fast.fit`."""
    x, context = case.inputs()
    result = glf_fast.fit(
        flow, x, context, epochs=case.epochs, batch_size=case.flow.batch, lr=RATE, validation=HELD_OUT, progress=False
    )
    return result.validation_loss


def loop(case: FitCase, density: Density) -> list[float]:
    """The validation losses of a run by a loop in PyTorch."""
    x, context = case.inputs()
    rows = torch.randperm(len(x))
    n, batch = round(HELD_OUT * len(x)), case.flow.batch
    held_out, train = rows[:n], rows[n:]
    optimizer = torch.optim.AdamW(density.module.parameters(), RATE, fused=True)
    best, losses = density.module.state_dict(), []

    def loss(index: Tensor) -> Tensor:
        return -density.log_prob(x[index], None if context is None else context[index]).mean()

    for _ in range(case.epochs):
        density.module.train()
        order = train[torch.randperm(len(train))]
        batches = []
        for index in order[: len(order) // batch * batch].split(batch):
            optimizer.zero_grad()
            found = loss(index)
            found.backward()
            optimizer.step()
            batches.append(found.item())
        density.module.eval()
        with torch.no_grad():
            losses.append(sum(loss(index).item() * len(index) for index in held_out.split(batch)) / n)
        if losses[-1] <= min(losses):
            best = copy.deepcopy(density.module.state_dict())
    density.module.load_state_dict(best)
    return losses


def _job(case: FitCase, run: Callable[[], list[float]], expected: float | None = None) -> Job:
    def check(out: list[float]) -> str:
        right = len(out) == case.epochs and bool(torch.tensor(out).isfinite().all())
        if right and expected is not None:
            right = abs(out[-1] / expected - 1) < 0.1  # the mean of other rows
        return "" if right else f"validation losses {out}, where {expected} is right"

    return Job(run, check, rate=("epochs", case.epochs))


def _ours(way: str, case: FitCase, mode: str, clock: Clock) -> Job:
    flow = case.flow.flow()
    x, context = case.inputs()
    with torch.no_grad(), glf_fast.use_backend("reference"):
        expected = (
            -copy.deepcopy(flow).double().log_prob(x.double(), None if context is None else context.double()).mean()
        )
    run = partial(fused, case, flow) if way == "fit" else partial(loop, case, Density(flow, flow.log_prob, flow.sample))
    return _job(case, run, float(expected))


def _library_job(library: Library, case: FitCase, mode: str, clock: Clock) -> Job:
    flow = library_flow(library, case.flow, "train", "cpu")
    return _job(case, partial(loop, case, Density(flow.module, flow.log_prob, flow.sample)))


def _library(library: Library) -> Provider:
    return Provider(
        library.name,
        partial(_library_job, library),
        lambda case, mode, device: library.why_not(case.flow.context_dim),
    )


def _flowjax_job(case: FitCase, mode: str, clock: Clock) -> Job:
    process = Elsewhere("flowjax", case.name, "fit")
    process.wait()
    return Job(None, lambda _: "", bursts=process, rate=("epochs", case.epochs))


PROVIDERS: dict[str, Provider] = {
    "glf_fast": Provider("glf_fast", partial(_ours, "fit")),
    "glf_fast, loop": Provider("glf_fast, loop", partial(_ours, "loop")),
    **{name: _library(LIBRARIES[name]) for name in ("nflows", "zuko")},
    "flowjax": Provider("flowjax", _flowjax_job, lambda case, mode, device: flowjax.why_not()),
}
