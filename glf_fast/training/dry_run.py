"""A preview of a run: settings, shapes, parameters, memory, the time of a step. Nothing is written."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from glf_fast.data import Dataset
from glf_fast.training.config import Config
from glf_fast.training.config_files import to_toml
from glf_fast.training.trainer import Trainer

__all__ = ["dry_run"]


def dry_run(config: Config, train: Dataset, test: Dataset, device: torch.device) -> None:
    """Build everything, take two real steps of the first stage, and print the results."""
    trainer = Trainer(config, train, device)
    batch = trainer.inputs()[: config.batch_size]

    # Bytes of the storages that the forward pass saves for the backward pass, each storage once, without the weights.
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.step(batch)
    for parameter in trainer.model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    started = time.perf_counter()
    values = {name: float(loss) for name, loss in trainer.step(batch).items()}  # float() waits for a GPU
    seconds = time.perf_counter() - started

    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in trainer.model.named_children()}
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    memory = {
        "data": train.items.nbytes,
        "weights, gradients": 2 * weights,
        "Adam": 2 * weights,
        "average": weights if config.ema else 0,
        "activations": sum(kept.values()),
    }
    steps, total = len(train) // config.batch_size, trainer.ends[-1] // config.batch_size
    print(to_toml(config))
    print(f"# data        {train.name}: {_shape(train.items)} for training, {_shape(test.items)} for scores")
    kind = str(batch.dtype).removeprefix("torch.")
    print(f"# batch       {_shape(batch)} {kind} on {device}, {steps} steps an epoch, {total} steps in all")
    print(f"# parameters  {sum(parts.values()):,}: " + ", ".join(f"{name} {count:,}" for name, count in parts.items()))
    listed = ", ".join(f"{name} {_megabytes(size)}" for name, size in memory.items() if size)
    print(f"# memory      about {_megabytes(sum(memory.values()))}: {listed}")
    if device.type == "cuda":
        print(f"#             {_megabytes(torch.cuda.max_memory_allocated(device))} at the peak of a step")
    print(f"# one step    {seconds:.3g} s; losses {', '.join(f'{name} {value:.4g}' for name, value in values.items())}")
    print(f"# whole run   about {seconds * total / 60:.3g} minutes without scores; nothing was written")


def _shape(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
