"""A whole training run of a flow by maximum likelihood."""

from __future__ import annotations

import contextlib
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from glf_fast.fitting.dataset import dataset
from glf_fast.fitting.progress_file import ProgressFile
from glf_fast.fitting.run import FitResult, Run
from glf_fast.flow import Flow
from glf_fast.ops.checks import check_choice
from glf_fast.progress import Progress, stop_on_signals

__all__ = ["fit"]

# Share of the run that is done → factor of the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done))}


def fit(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    clip: float | None = None,
    weights: Tensor | None = None,
    validation: float | tuple[Tensor, Tensor | None] = 0.1,
    patience: int | None = None,
    schedule: str | None = None,
    seed: int = 0,
    callback: Callable[[FitResult], object] | None = None,
    progress: bool = True,
    resume: Path | str | None = None,
) -> FitResult:
    """Train a flow by maximum likelihood: AdamW on the mean of −log p(x | context) over random batches.

    A run is that of a plain PyTorch loop with torch.optim.AdamW. A `CouplingFlow` or `AutoregressiveFlow` on a processor takes
    many steps in one call of C++, without Python, autograd or the GIL; on a GPU, with the rows on the same GPU, its steps are
    replays of one CUDA graph (`GraphedStep`). Any other flow takes steps one by one, with the same results up to rounding, and
    on a GPU a line of progress says why. Each epoch goes through the rows in a new order, in batches of one size; rows that do
    not fill a batch are left out of that epoch. ActNorms start from the first batch. The flow is left in evaluation mode.

    With validation the flow is left as it was after the epoch of the lowest validation loss, else as the last step made it.
    Ctrl-C ends training after the step at hand, in the same way, and the result says "interrupted".

    Args:
        flow: the flow, which is changed in place. Its parameters that require gradients are trained.
        x: (N, *event_shape), in the flow's dtype; it may stay on another device.
        context: (N, *context_shape), of a conditional flow.
        epochs: how often to go through the rows at most.
        batch_size: rows of a step.
        lr: learning rate. weight_decay: AdamW's, decoupled.
        clip: scale gradients down whose norm, over all parameters, is above this.
        weights: (N,) ≥ 0, factors of the rows' losses, such as importance weights; scaled to a mean of 1.
        validation: fraction of the rows, drawn at random, to hold out; or rows to validate on, (x, context or None); 0: none.
        patience: stop after so many epochs without a lower validation loss.
        schedule: "cosine": the learning rate falls to 0 along half a cosine in `epochs` epochs; None: it is constant.
        seed: of the rows held out, the order of rows and of what is random in the flow itself, such as dropout. The flow's
            initial weights depend on torch's own seed. The global generators of torch are left as they were.
        callback: called with the result so far after every epoch; training stops if it returns True.
        progress: show progress on stderr.
        resume: path of a file in which the run is kept. If it exists, the run goes on from there, to the same weights bit for
            bit on a processor as if it had not been interrupted; `epochs` (without a schedule) and `patience` may have grown.

    Returns:
        Losses by epoch, and why training stopped.

    Raises:
        ValueError, TypeError: arguments that do not fit each other or the flow, NaN in the data, a file of another run.
        FloatingPointError: the loss or its gradient is not finite; the flow is as it was before that step.

    Sources: AdamW, arXiv:1711.05101; cosine, arXiv:1608.03983.

    Example:
        >>> flow = CouplingFlow(dim=3, steps=4, hidden=(32, 32))
        >>> result = fit(flow, torch.randn(1000, 3), epochs=5, progress=False)
        >>> len(result.validation_loss), result.stopped
        (5, 'epochs')
    """
    _check(flow, epochs, batch_size, lr, weight_decay, clip, validation, patience, schedule)
    data = dataset(flow, x, context, weights, validation, seed)
    if batch_size > len(data.train):
        raise ValueError(f"batch_size={batch_size} is larger than the {len(data.train)} rows to train on")
    settings = {
        "flow": _kind(flow),
        "data": data.digest() if resume is not None else "",
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "clip": clip, "seed": seed,
        "schedule": schedule, "epochs": epochs if schedule else None,
        "validation": validation if isinstance(validation, int | float) else "rows",
    }  # fmt: skip
    per_epoch = len(data.train) // batch_size
    total = epochs * per_epoch

    def rates(first: int) -> list[float]:
        """The learning rates from this step of the run to the end of its epoch."""
        end = (first // per_epoch + 1) * per_epoch
        factor = SCHEDULES[schedule] if schedule else lambda done: 1.0
        return [lr * factor(step / total) for step in range(first, end)]

    limit = math.inf if clip is None else clip
    with Run(flow, data, batch_size, lr, weight_decay, limit, seed, ProgressFile(resume, settings)) as run:
        result = run.result
        sizes = (total * batch_size, result.steps * batch_size, per_epoch * batch_size)
        shown = Progress(*sizes, "rows") if progress else None
        with shown or contextlib.nullcontext(), stop_on_signals(signal.SIGINT) as stop:
            if shown and run.note:
                shown.say(run.note)
            while not (result.stopped or run.ends(epochs, patience)):
                run.advance(rates(result.steps))
                if run.at_epoch_end and callback is not None and callback(result) is True:
                    result.stopped = "callback"
                elif stop.signal:
                    result.stopped = "interrupted"
                if shown:
                    shown.update(result.steps * batch_size, run.latest_losses())
            if shown and result.stopped == "interrupted":
                when = f"epoch {result.best_epoch}" if result.validation_loss else "the last step"
                shown.say(f"interrupted in epoch {run.epoch + 1}; the flow has the weights of {when}")
        run.finish()
    return result


def _kind(flow: Flow) -> list[Any]:
    """What a run of another flow has otherwise: the modules and their options, shapes, and what is trained."""
    shapes = [(name, tuple(t.shape), t.requires_grad) for name, t in (*flow.named_parameters(), *flow.named_buffers())]
    return [re.sub(r" at 0x[0-9a-f]+", "", repr(flow)), *shapes]


def _check(
    flow: Flow, epochs: int, batch_size: int, lr: float, weight_decay: float, clip: float | None,
    validation: float | tuple[Tensor, Tensor | None], patience: int | None, schedule: str | None,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError for numbers out of their ranges."""
    if not isinstance(flow, Flow):
        raise TypeError(
            f"flow must be a glf_fast.Flow; got {type(flow).__name__} (glf_fast.convert makes one of another library's)"
        )
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number ≥ 1; got {value!r}")
    for name, number in (("lr", lr), ("clip", clip)):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be > 0 and finite; got {number!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be ≥ 0 and finite; got {weight_decay!r}")
    if patience is not None and isinstance(validation, int | float) and validation == 0:
        raise ValueError(
            "patience looks at the validation loss, and there is none: give validation rows, or a fraction"
        )
    if schedule is not None:
        check_choice("schedule", schedule, SCHEDULES)
