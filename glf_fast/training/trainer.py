"""One model in training: its stages and phases, the averaged weights, and saving and restoring all of it."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import distributed, models, seeds
from glf_fast.data import CONTENTS, Dataset
from glf_fast.errors import UserError, lacks_memory
from glf_fast.images import to_float
from glf_fast.models import Stage
from glf_fast.training import checkpoint, parallel
from glf_fast.training.checkpoint import Checkpoint
from glf_fast.training.config import Config, OptimizerConfig

__all__ = ["REMEDY", "Trainer"]

# Steps between two updates of the average. An update reads and writes all weights, so eight small updates are combined in one.
_AVERAGE_EVERY = 8
# Batch size for computing the inputs of a stage.
_CHUNK = 500

REMEDY = "lower the learning rates (--optimizer.lr) or clip gradients (--optimizer.clip 1)"


class Trainer:
    """The state that a training step changes: weights, their average, the optimizers, and the number of items seen.

    Random numbers depend on (seed, images seen) alone, so that a restored trainer continues bit for bit. Several processes
    (`distributed`) each have a part of every batch, and equal states after every step.

    Attributes:
        model: the model in training.    average: a copy with averaged weights, in eval mode; None without `ema`.
        optimizers: one for each group of parameters, by the group's name.
        images: items of the data set seen so far.    images_per_epoch: whole batches in the training set.
        stage: index of the stage that is being trained.    ends: value of `images` at which each stage ends.
    """

    def __init__(self, config: Config, train: Dataset, device: torch.device, *, local_batch_norm: bool = False) -> None:
        self.config, self.device, self.train = config, device, train
        self.local_batch_norm = local_batch_norm
        self.images = self.stage = 0
        kind = models.kind(config.model.name)
        if train.kind not in kind.takes:
            wanted = " or ".join(words for content, words in CONTENTS.items() if content in kind.takes)
            others = [name for name in models.names() if train.kind in models.kind(name).takes]
            remedy = (
                f"choose --model.name {' or '.join(others)}" if others else "no model takes these, so choose other data"
            )
            raise UserError(
                f"model {config.model.name!r} takes {wanted}, but {train.name} holds {CONTENTS[train.kind]}; {remedy}"
            )
        self.images_per_epoch = len(train) // config.batch_size * config.batch_size
        if not self.images_per_epoch:
            raise UserError(
                f"batch_size = {config.batch_size} is more than the {len(train)} training items of {train.name}; "
                f"use --batch-size {len(train)} or less"
            )
        _check_share(config.batch_size, local_batch_norm)
        torch.manual_seed(config.seed)
        try:
            with distributed.unhurried():  # a model may fetch the weights of its loss
                self.model = kind(train.shape, config.model.trained_on(train)).to(device)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # and sizes that no memory has
            if lacks_memory(error):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"model {config.model.name!r} cannot be built for {train.name}: {reason}") from error
        if distributed.together():
            distributed.broadcast(list(self.model.state_dict().values()))
            if not local_batch_norm:
                parallel.share_statistics(self.model)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False) if config.ema else None
        groups = self.model.parameter_groups()
        assert tuple(groups) == kind.groups, (
            f"{kind.__name__}.groups and its parameter_groups() must name the same groups"
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: _optimizer(parameters, config.optimizers[name])
            for name, parameters in groups.items()
            if parameters  # settings may leave a network out
        }
        self.ends: list[int] = []
        for stage in self.model.stages():
            epochs = 0 if stage.fit else config.epochs if stage.epochs is None else stage.epochs
            self.ends.append((self.ends or [0])[-1] + epochs * self.images_per_epoch)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        self._start: dict[str, Tensor] = {}  # the weights with which this stage's inputs are computed, if it has inputs
        self._logged: set[str] = set()  # names of losses that were checked
        self._losses: dict[tuple[int, int], Callable[..., dict[str, Tensor]]] = {}  # by stage and phase
        labelled = any(stage.labelled for stage in self.model.stages())
        self._labels = train.labels.to(device) if labelled and train.labels is not None else None

    @property
    def remedy(self) -> str:
        """The advice for training that diverges, for messages."""
        return "; ".join(filter(None, (REMEDY, self.model.words.advice)))

    @property
    def best_model(self) -> models.GenerativeModel:
        """The model to score and to sample: the averaged model if there is one."""
        return self.average or self.model

    # -- stages ------------------------------------------------------------------------------------------------------------

    @property
    def labels_digest(self) -> str:
        """SHA-256 of the labels that the model is trained on; "" for a model that takes none."""
        return "" if self._labels is None else hashlib.sha256(self._labels.cpu().numpy().tobytes()).hexdigest()

    @property
    def in_last_stage(self) -> bool:
        """Whether the last stage has begun. In earlier stages samples are meaningless."""
        return self.stage == len(self.ends) - 1

    def advance(self) -> None:
        """Begin the next stage from the weights of `best_model`, and do its closed-form fit if it has one."""
        if self.average is not None:
            self.model.load_state_dict(self.average.state_dict())
        self.stage += 1
        self._losses.clear()
        self._start = (
            {name: value.clone() for name, value in self.model.state_dict().items()} if self._stage.inputs else {}
        )
        if fit := self._stage.fit:
            with torch.no_grad():
                fit(self.inputs())
            distributed.broadcast(list(self.model.state_dict().values()))  # different machines round differently
            if self.average is not None:
                self.average.load_state_dict(self.model.state_dict())

    def inputs(self) -> Tensor:
        """The tensor from which batches of this stage are taken, on the device: the training set, or the stage's inputs.

        Inputs are computed with the weights with which the stage began, so that a resumed stage has the same ones.
        """
        # The whole set is one tensor on the device, so steps need no worker processes and no copies.
        items, compute = self.train.items.to(self.device), self._stage.inputs
        if compute is None:
            return items
        present = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self._start or present)
        with self.model.evaluating():
            parts = distributed.parts(len(items), _CHUNK)
            own = items[parts[distributed.rank()].start : parts[distributed.rank()].stop]
            found = torch.cat([compute(_to_model(batch)) for batch in own.split(_CHUNK)])
        self.model.load_state_dict(present)
        return distributed.joined(found, [len(part) for part in parts])

    @property
    def _stage(self) -> Stage:
        return self.model.stages()[self.stage]

    @property
    def _begin(self) -> int:
        """The value of `images` at which this stage began."""
        return self.ends[self.stage - 1] if self.stage else 0

    # -- steps -------------------------------------------------------------------------------------------------------------

    def step(self, batch: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """Train on a batch (B, …) of `inputs`; returns the losses of all phases, without waiting for a GPU.

        Args:
            batch: of several processes, the part of this process, see `share`.
            index: places (B,) of the batch in `inputs`, and so in the training set; by default the first ones.
        """
        noise, own = (
            seeds.generator(self.config.seed, "step", stream, self.images, device=self.device)
            for stream in (0, distributed.rank())
        )
        torch.manual_seed(own.initial_seed())  # for Dropout and whatever else has no generator of its own
        steps, x = (self.images - self._begin) // self.config.batch_size, _to_model(batch)
        labels = None
        if self._labels is not None:
            labels = self._labels[: len(batch)] if index is None else self._labels[index]
        losses: dict[str, Tensor] = {}
        self.model.train()
        for i, phase in enumerate(self._stage.phases):
            if steps % phase.every:
                continue
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                found = self._forward(i)(x, noise, index, labels)
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            found[phase.minimises].backward()
            norms = {name: self._update(name, watched=phase.gradients) for name in phase.moves}
            found |= {f"gradient_{name}": norm for name, norm in norms.items() if norm is not None}
            if not self._logged.issuperset(found):
                _check_names(found, losses)
                self._logged |= found.keys()
            losses |= {name: loss.detach() for name, loss in found.items()}
        self.images += distributed.size() * len(batch)
        if self.local_batch_norm and distributed.together():
            parallel.average_statistics(self.model)
        if self.average is not None and steps % _AVERAGE_EVERY == 0:
            self._update_average(steps // _AVERAGE_EVERY)
        return losses

    def share(self, batch: Tensor) -> Tensor:
        """The part of a whole batch (B, …), or of its places, that this process trains on."""
        return batch.chunk(distributed.size())[distributed.rank()]

    def _forward(self, phase: int) -> Callable[..., dict[str, Tensor]]:
        """The losses of a phase as a function of (x, generator, index, labels)."""
        at = self.stage, phase
        if at not in self._losses:
            if distributed.together():
                self._losses[at] = parallel.wrapped(self.model, *at)
            else:
                self._losses[at] = lambda x, generator, *given: self.model(x, generator, *at, *given)
        return self._losses[at]

    def _update(self, name: str, *, watched: bool) -> Tensor | None:
        """Update one parameter group by its gradients; returns their norm before clipping if it is `watched`."""
        settings, [group] = self.config.optimizers[name], self.optimizers[name].param_groups
        norm = None
        if settings.clip:
            norm = nn.utils.clip_grad_norm_(group["params"], settings.clip)
        elif watched:
            norm = nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
        group["lr"] = self._learning_rate(settings)
        self.optimizers[name].step()
        return norm if watched else None

    @torch.no_grad()
    def _update_average(self, updates: int) -> None:
        assert self.average is not None
        # A young average spans the last tenth of the steps, until `ema` gives a longer span.
        decay = min(self.config.ema**_AVERAGE_EVERY, updates / (updates + 10))
        averaged, current = self.average.state_dict().values(), self.model.state_dict().values()
        floating = [(a, b) for a, b in zip(averaged, current, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], 1 - decay)
        for a, b in zip(averaged, current, strict=True):
            if not a.is_floating_point():
                a.copy_(b)

    def _learning_rate(self, settings: OptimizerConfig) -> float:
        """The learning rate of the next step; schedules begin again with each stage."""
        seen = self.images - self._begin
        epoch, steps = seen // self.images_per_epoch, seen // self.config.batch_size
        if settings.schedule == "cosine":
            done = seen / (self.ends[self.stage] - self._begin)
            factor = 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
        else:
            factor = settings.decay_factor ** (epoch // settings.decay_every) if settings.decay_every else 1.0
        warm = min(1.0, (steps + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        return settings.lr * factor * warm

    # -- checkpoints -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path, state: dict[str, Any], *, for_resuming: bool) -> None:
        """Write a checkpoint; `restore` returns its `state` (JSON-ready).

        Raises:
            UserError: a weight is not finite; nothing is written.
            OSError: the checkpoint could not be written (disk full …); the previous checkpoint stays.
        """
        weights = self.best_model.state_dict()
        training: dict[str, Tensor] = {}
        if for_resuming:
            for optimizer in self.optimizers.values():
                training |= checkpoint.optimizer_tensors(optimizer, self._names)
            if self.average is not None:
                training |= {f"model.{name}": value for name, value in self.model.state_dict().items()}
            training |= {f"start.{name}": value for name, value in self._start.items()}
        for name, value in {**weights, **training}.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise UserError(
                    f"{name} is not finite after {self.images} images; {folder} was left unchanged; "
                    f"{self.remedy}; start a new run"
                )
        own = {"images": self.images, "stage": self.stage, "ends": self.ends, "local_batch_norm": self.local_batch_norm}
        state = own | state
        distributed.by_main(checkpoint.write)(
            folder, Checkpoint(self.config.model.name, self.model.config, weights, training, state)
        )

    def restore(self, folder: Path) -> dict[str, Any]:
        """Restore the trainer from a checkpoint, and return the `state` of the checkpoint.

        Raises:
            UserError: the checkpoint is incomplete or corrupt, or the epochs of a finished stage, or local_batch_norm, have
                changed since.
        """
        saved = checkpoint.read(folder, training=True)
        before = saved.state.get("local_batch_norm", self.local_batch_norm)  # earlier checkpoints do not say
        if before != self.local_batch_norm:
            has, remedy = ("with", "give the option again") if before else ("without", "leave the option out")
            raise UserError(f"{folder} was trained {has} --local-batch-norm; {remedy}, or choose another --out")
        stage = saved.state.get("stage", 0)  # version 0.1.0 knew no stages
        if stage and saved.state["ends"][:stage] != self.ends[:stage]:
            raise UserError(
                f"{folder} has finished stage {stage} of its training, so the epochs of this stage cannot change any more; "
                "use the same epochs as before, or choose another --out"
            )
        raw, self._start = (_below(prefix, saved.training) for prefix in ("model.", "start."))
        self.model.load_state_dict(raw or saved.weights)
        if self.average is not None:
            self.average.load_state_dict(saved.weights)
        for optimizer in self.optimizers.values():
            checkpoint.restore_optimizer(optimizer, self._names, saved.training)
        self.images, self.stage = saved.state["images"], stage
        return saved.state


def _check_share(batch_size: int, local_batch_norm: bool) -> None:
    """Raise UserError unless the processes can divide a batch."""
    count = distributed.size()
    if batch_size % count:
        lower, upper = batch_size // count * count, -(-batch_size // count) * count
        fits = f"{lower} or {upper}" if lower > 1 else str(upper)
        raise UserError(
            f"batch_size = {batch_size}, the images of a step of all processes together, does not divide among {count} "
            f"processes; use --batch-size {fits}"
        )
    if local_batch_norm and batch_size // count < 2:
        raise UserError(f"--local-batch-norm needs two images for each of {count} processes; use a larger --batch-size")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_names(found: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the losses of a phase have names that the log, and the phases before, leave free."""
    taken = {"images", "epoch", "score", "finished", "images_per_second", *before}
    if wrong := [name for name in found if name in taken or name.startswith("lr_")]:
        raise ValueError(
            f"a phase has the losses {', '.join(found)}; {', '.join(wrong)} is a name of the log, or of another phase's loss"
        )


def _to_model(batch: Tensor) -> Tensor:
    """A batch of a data set in the form that models take: pixels in [0, 1], other data unchanged."""
    return to_float(batch) if batch.dtype == torch.uint8 else batch


def _optimizer(parameters: list[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}
    if settings.algorithm == "adamax":
        return torch.optim.Adamax(parameters, **options)
    return torch.optim.Adam(parameters, fused=True, **options)
