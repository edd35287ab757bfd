"""One model in training: the step, the averaged weights, and saving and restoring all of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import checkpoint, models, seeds
from glf_fast.checkpoint import Checkpoint
from glf_fast.config import Config, OptimizerConfig
from glf_fast.data import ImageDataset
from glf_fast.errors import UserError
from glf_fast.images import to_float

__all__ = ["LossLog", "Trainer"]

# Steps between two moves of the average, each as far as that many small ones: one reads and writes all weights.
_AVERAGE_EVERY = 8


class Trainer:
    """All that a step changes: weights, their average, the optimizer, and how many images were seen.

    Nothing random depends on anything but (seed, images seen), so that a restored trainer goes on bit for bit.

    Attributes:
        model: in training.    average: its averaged twin in eval mode, None without `ema`.
        images: seen so far.    images_per_epoch: whole batches in the training set.
    """

    def __init__(self, config: Config, train: ImageDataset, device: torch.device) -> None:
        self.config, self.device, self.images = config, device, 0
        self.images_per_epoch = len(train.images) // config.batch_size * config.batch_size
        if not self.images_per_epoch:
            raise UserError(
                f"batch_size = {config.batch_size} is more than the {len(train.images)} training images of {train.name}; "
                f"take --batch-size {len(train.images)} or less"
            )
        torch.manual_seed(config.seed)
        self.model = models.build(config.model.name, config.model_arguments(tuple(train.images.shape[1:]))).to(device)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False) if config.ema else None
        groups = [
            {"params": parameters, "name": name, **_adam(getattr(config, f"{name}_optimizer"))}
            for name, parameters in self.model.parameter_groups().items()
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}

    @property
    def best_model(self) -> models.GenerativeModel:
        """The one to score and to sample: the average if there is one."""
        return self.average or self.model

    def step(self, batch: Tensor) -> dict[str, Tensor]:
        """Learn from a uint8 batch (B, C, H, W) on the device; returns the losses, without waiting for a GPU."""
        noise = seeds.generator(self.config.seed, "step", 0, self.images, device=self.device)
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            losses = self.model(to_float(batch), noise)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        for group in self.optimizer.param_groups:
            if limit := self._settings(group).clip:
                nn.utils.clip_grad_norm_(group["params"], limit)
            group["lr"] = self._learning_rate(self._settings(group))
        self.optimizer.step()
        steps, self.images = self.images // self.config.batch_size, self.images + len(batch)
        if self.average is not None and steps % _AVERAGE_EVERY == 0:
            self._update_average(steps // _AVERAGE_EVERY)
        return {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def _update_average(self, updates: int) -> None:
        assert self.average is not None
        # Young averages forget faster: over the last tenth of the steps, until that is longer than what `ema` says.
        decay = min(self.config.ema**_AVERAGE_EVERY, updates / (updates + 10))
        ours, theirs = self.average.state_dict().values(), self.model.state_dict().values()
        floating = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], 1 - decay)
        for a, b in zip(ours, theirs, strict=True):
            if not a.is_floating_point():
                a.copy_(b)

    def _learning_rate(self, settings: OptimizerConfig) -> float:
        """Of the coming step."""
        epoch, steps = self.images // self.images_per_epoch, self.images // self.config.batch_size
        if settings.schedule == "cosine":
            done = self.images / (self.config.epochs * self.images_per_epoch)
            factor = 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
        else:
            factor = settings.decay_factor ** (epoch // settings.decay_every) if settings.decay_every else 1.0
        warm = min(1.0, (steps + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        return settings.lr * factor * warm

    def _settings(self, group: dict[str, Any]) -> OptimizerConfig:
        return getattr(self.config, f"{group['name']}_optimizer")

    # -- checkpoints -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path, state: dict[str, Any], *, for_resuming: bool) -> None:
        """Write a checkpoint; `state` (JSON) comes back from `restore`.

        Raises:
            UserError: a weight is not finite; nothing is written.
            OSError: the disk is full, or alike; what was there stays.
        """
        weights, training = self.best_model.state_dict(), {}
        if for_resuming:
            training = checkpoint.optimizer_tensors(self.optimizer, self._names)
            if self.average is not None:
                training |= {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, value in {**weights, **training}.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise UserError(
                    f"{name} is not finite after {self.images} images; {folder} was left as it is; {CURE}, and start a new run"
                )
        state = {"images": self.images, **state}
        checkpoint.write(folder, Checkpoint(self.config.model.name, self.model.config, weights, training, state))

    def restore(self, folder: Path) -> dict[str, Any]:
        """Go back to where a checkpoint was written, and return its `state`; raises UserError when it is not whole."""
        saved = checkpoint.read(folder, training=True)
        prefix = "model."
        raw = {name.removeprefix(prefix): v for name, v in saved.training.items() if name.startswith(prefix)}
        self.model.load_state_dict(raw or saved.weights)
        if self.average is not None:
            self.average.load_state_dict(saved.weights)
        checkpoint.restore_optimizer(self.optimizer, self._names, saved.training)
        self.images = saved.state["images"]
        return saved.state


CURE = "lower the learning rates (--flow-optimizer.lr) or limit gradients (--flow-optimizer.clip 1)"


def _adam(settings: OptimizerConfig) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}


class LossLog:
    """The losses of the last steps, kept on the device so that no step waits for them."""

    def __init__(self, capacity: int = 50) -> None:
        self.capacity, self.count = capacity, 0
        self._names: list[str] = []
        self._values = torch.empty(0)

    @property
    def full(self) -> bool:
        """Whether `flush` must come before the next `add`."""
        return self.count == self.capacity

    def add(self, losses: dict[str, Tensor]) -> None:
        """Take the losses of one step, scalars on the device."""
        row = torch.stack([loss.float() for loss in losses.values()])
        if not self._names:
            self._names, self._values = list(losses), row.new_empty(self.capacity, len(row))
        self._values[self.count] = row
        self.count += 1

    def flush(self, images: int, batch_size: int, last: Path) -> dict[str, float]:
        """The means since the last flush; waits for the device.

        Raises:
            UserError: a loss was not finite: says which, at which step, and where the last good checkpoint is.
        """
        values, self.count = self._values[: self.count].cpu(), 0
        for back, row in zip(range(len(values) - 1, -1, -1), values, strict=True):
            if not row.isfinite().all():
                at = images - back * batch_size
                terms = ", ".join(
                    f"{name} = {value:.4g}" for name, value in zip(self._names, row.tolist(), strict=True)
                )
                kept = (
                    f"the last good checkpoint is {last}" if checkpoint.exists(last) else "there is no checkpoint yet"
                )
                raise UserError(
                    f"the loss is not finite at step {at // batch_size} ({at} images): {terms}; {kept}; {CURE}"
                )
        return dict(zip(self._names, values.mean(0).tolist(), strict=True))
