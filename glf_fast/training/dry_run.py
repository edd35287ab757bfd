"""A preview of a run: settings, shapes, parameters, memory, the time of a step. Nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from glf_fast.data import Dataset
from glf_fast.images import to_float
from glf_fast.training.config import Config
from glf_fast.training.config_files import to_toml
from glf_fast.training.trainer import Trainer

__all__ = ["Preview", "dry_run", "preview"]


@dataclass(frozen=True)
class Preview:
    """Two real steps of each stage of a run.

    Attributes:
        batch: the batch of the first stage's steps.
        losses: the losses of its second step.    seconds: the duration of that step.
        activations: bytes that the forward pass saves for the backward pass, without the weights.
        parameters: number of parameters of each part of the model.    weights: bytes of all parameters.
        steps: number of steps of the whole run.
        minutes: estimate of the minutes of the whole run, without scores and closed-form fits.
    """

    batch: Tensor
    losses: dict[str, float]
    seconds: float
    activations: int
    parameters: dict[str, int]
    weights: int
    steps: int
    minutes: float


def preview(config: Config, train: Dataset, device: torch.device) -> Preview:
    """Build everything, and take two steps of each stage."""
    trainer = Trainer(config, train, device)
    index = trainer.share(torch.arange(config.batch_size, device=device))
    batch = trainer.inputs()[index]
    items = trainer.share(train.items[: config.batch_size].to(device))

    kept: dict[int, int] = {}  # bytes of each storage that is saved, which is counted once

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.step(batch, index)
    for parameter in trainer.model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    losses, seconds = _timed_step(trainer, batch, index)
    lengths = [end - begin for begin, end in zip([0, *trainer.ends], trainer.ends, strict=False)]
    total = seconds * lengths[0]
    for number, stage in enumerate(trainer.model.stages()[1:], 1):
        if not stage.phases:
            continue
        x = to_float(items) if items.dtype == torch.uint8 else items
        with trainer.model.evaluating():
            x = stage.inputs(x) if stage.inputs else x
        trainer.stage, trainer.images = number, trainer.ends[number - 1]
        trainer.step(x, index)
        total += _timed_step(trainer, x, index)[1] * lengths[number]
    return Preview(
        batch=batch,
        losses=losses,
        seconds=seconds,
        activations=sum(kept.values()),
        parameters={name: sum(p.numel() for p in part.parameters()) for name, part in trainer.model.named_children()},
        weights=sum(p.numel() * p.element_size() for p in trainer.model.parameters()),
        steps=trainer.ends[-1] // config.batch_size,
        minutes=total / config.batch_size / 60,
    )


def _timed_step(trainer: Trainer, batch: Tensor, index: Tensor) -> tuple[dict[str, float], float]:
    """The losses of a step, and its seconds."""
    started = time.perf_counter()
    losses = {name: float(loss) for name, loss in trainer.step(batch, index).items()}  # float() waits for a GPU
    return losses, time.perf_counter() - started


def dry_run(config: Config, train: Dataset, test: Dataset, device: torch.device) -> None:
    """Print the settings, and the preview of the run."""
    seen = preview(config, train, device)
    memory = {
        "data": train.items.nbytes,
        "weights, gradients": 2 * seen.weights,
        "Adam": 2 * seen.weights,
        "average": seen.weights if config.ema else 0,
        "activations": seen.activations,
    }
    steps, parameters = len(train) // config.batch_size, seen.parameters
    print(to_toml(config))
    print(f"# data        {train.name}: {_shape(train.items)} for training, {_shape(test.items)} for scores")
    kind = str(seen.batch.dtype).removeprefix("torch.")
    print(f"# batch       {_shape(seen.batch)} {kind} on {device}, {steps} steps an epoch, {seen.steps} steps in all")
    counts = ", ".join(f"{name} {count:,}" for name, count in parameters.items())
    print(f"# parameters  {sum(parameters.values()):,}: {counts}")
    listed = ", ".join(f"{name} {_megabytes(size)}" for name, size in memory.items() if size)
    print(f"# memory      about {_megabytes(sum(memory.values()))}: {listed}")
    if device.type == "cuda":
        print(f"#             {_megabytes(torch.cuda.max_memory_allocated(device))} at the peak of a step")
    losses = ", ".join(f"{name} {value:.4g}" for name, value in seen.losses.items())
    print(f"# one step    {seen.seconds:.3g} s; losses {losses}")
    print(f"# whole run   about {seen.minutes:.3g} minutes without scores; nothing was written")


def _shape(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
