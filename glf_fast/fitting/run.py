"""The state of one run of `fit`: what it has done, where it is in its data, its best weights, and how it goes on."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from glf_fast import seeds
from glf_fast.fitting import fused, graphed
from glf_fast.fitting.dataset import Dataset
from glf_fast.fitting.progress_file import ProgressFile
from glf_fast.fitting.steps import Steps, adamw
from glf_fast.flow import Flow
from glf_fast.flow.stacked_flow import StackedFlow

__all__ = ["FitResult", "Run"]


@dataclass
class FitResult:
    """What a run of `fit` did.

    Attributes:
        training_loss: mean loss of the batches of each epoch, each before its step, in nats.
        validation_loss: loss on the rows held out after each epoch, in nats; empty without validation.
        best_epoch: the epoch, from 1, whose weights the flow has; without validation the last whole one. 0 before the first.
        steps: steps of the optimizer in all.
        seconds: the time that they took, with validation.
        stopped: "epochs", "patience", "callback" or "interrupted" (Ctrl-C); "" while it runs.
    """

    training_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    best_epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    stopped: str = ""


class Run:
    """A run, as a context in which torch's global generators are its own, and after which the flow is in evaluation mode.

    Args:
        clip: longest gradient, over all parameters; infinity for any.
        file: the file to go on from, and to write to.

    Attributes:
        note: what the user should know of how steps are made, or "".
    """

    def __init__(
        self, flow: Flow, data: Dataset, batch_size: int, lr: float, weight_decay: float, clip: float, seed: int,
        file: ProgressFile,
    ) -> None:  # fmt: skip
        self.flow, self.data, self.batch_size, self.seed, self.file = flow, data, batch_size, seed, file
        self.result = FitResult()
        self._optimizer = adamw(flow, lr, weight_decay)
        self._device: torch.device = self._optimizer.param_groups[0]["params"][0].device
        self.note = ""
        self._steps = self._kind_of_steps()(flow, self._optimizer, data.rows, clip)  # type: ignore[arg-type]
        self._losses: list[float] = []  # of the epoch's steps so far
        self._order = torch.empty(0, dtype=torch.int64)  # its batches
        self._best: dict[str, Any] | None = None  # the flow's state after the best epoch

    def _kind_of_steps(self) -> type[fused.FusedSteps | graphed.GraphedSteps | Steps]:
        if isinstance(self.flow, StackedFlow) and not fused.why_not(self.flow, self.batch_size):
            return fused.FusedSteps
        if self._device.type != "cuda":
            return Steps
        if why := graphed.why_not(self.flow, self._optimizer, self.data.rows):
            self.note = f"each step goes through Python, because it cannot be captured as a CUDA graph: {why}"
        return Steps if why else graphed.GraphedSteps

    def __enter__(self) -> Run:
        on_gpu = [self._device] if self._device.type == "cuda" else []
        devices = [torch.device("cpu"), *on_gpu]
        state = self.file.read()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(on_gpu))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            self._set_random(*(seeds.generator(self.seed, "noise", device=d).get_state() for d in devices))
            if state is not None:
                self._restore(state)
            self._stack = stack.pop_all()
        self._began = time.perf_counter() - self.result.seconds
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._optimizer.zero_grad()
        self.flow.eval()
        self._stack.close()

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.result.training_loss)

    @property
    def at_epoch_end(self) -> bool:
        """Whether no epoch has begun that is not done."""
        return not self._losses

    def ends(self, epochs: int, patience: int | None) -> bool:
        """Whether it is over after so many epochs, or so many without a better one; the result then says why."""
        if self.at_epoch_end and self.epoch >= epochs:
            self.result.stopped = "epochs"
        elif self.at_epoch_end and patience is not None and self.epoch - self.result.best_epoch >= patience:
            self.result.stopped = "patience"
        return bool(self.result.stopped)

    def advance(self, rates: list[float]) -> None:
        """Take some of the steps that are left of an epoch, at these learning rates; validate if none is left after them.

        Raises:
            FloatingPointError: a loss or a gradient is not finite.
        """
        result = self.result
        if self.at_epoch_end or not len(self._order):
            self._order = self.data.order(self.seed, self.epoch, self.batch_size)
            self.flow.train()  # a callback may have drawn samples in evaluation mode
        losses, wrong = self._steps.run(self._order[len(self._losses) :], rates)
        self._losses += losses
        result.steps += len(losses)
        if wrong:
            raise FloatingPointError(
                f"the {wrong} is not finite in epoch {self.epoch + 1}, step {len(self._losses) + 1} of {len(self._order)} "
                f"(step {result.steps + 1} of the run); the flow is as it was before that step: lower lr, set clip, or look "
                "for outliers in the data"
            )
        if len(self._losses) == len(self._order):
            result.training_loss.append(math.fsum(self._losses) / len(self._losses))
            self._losses = []
            self._validate()
        result.seconds = time.perf_counter() - self._began
        if self.file.due():
            self.file.write(self._state())

    def latest_losses(self) -> dict[str, float]:
        """For the display."""
        result = self.result
        training = math.fsum(self._losses) / len(self._losses) if self._losses else result.training_loss[-1]
        return {"loss": training} | ({"validation": result.validation_loss[-1]} if result.validation_loss else {})

    def finish(self) -> None:
        """Write the file, and give the flow its best weights."""
        self.file.write(self._state())
        if self._best is not None:
            self.flow.load_state_dict(self._best)

    def _validate(self) -> None:
        result, rows = self.result, self.data.validation
        if not len(rows):
            result.best_epoch = self.epoch
            return
        loss = self._validation_loss(rows)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the validation loss is {loss} after epoch {self.epoch}; the flow is as that epoch left it: lower lr, set "
                "clip, or look for outliers in the rows held out"
            )
        result.validation_loss.append(loss)
        if loss < min(result.validation_loss[:-1], default=math.inf):
            result.best_epoch = self.epoch
            self._best = copy.deepcopy(self.flow.state_dict())

    @torch.no_grad()
    def _validation_loss(self, rows: Tensor) -> float:
        self.flow.eval()
        total = weight = 0.0
        for index in rows.split(4 * self.batch_size):  # without gradients a row takes less than a fourth of the memory
            x, context, weights = self.data.held_out.pick(index, torch.empty(0, device=self._device))
            log_prob = self.flow.log_prob(x, context).double()
            total -= float(log_prob.sum() if weights is None else weights.double() @ log_prob)
            weight += float(len(index) if weights is None else weights.double().sum())
        return total / weight if weight else math.nan

    # -- the file ------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "result": asdict(self.result) | {"stopped": ""},
            "losses": self._losses,
            "flow": self.flow.state_dict(),
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_on_gpu": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.flow.load_state_dict(state["flow"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.result, self._losses, self._best = FitResult(**state["result"]), state["losses"], state["best"]
        self._set_random(state["random"], state["random_on_gpu"])

    def _set_random(self, on_cpu: Tensor, on_gpu: Tensor | None = None) -> None:
        """Set the states of torch's global generators: not by torch.manual_seed, which sets those of all devices."""
        torch.set_rng_state(on_cpu)
        if self._device.type == "cuda" and on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, self._device)
