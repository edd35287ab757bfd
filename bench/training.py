"""A whole GLF step (autoencoder, flow, losses, optimizer) as `glf_fast.train` makes it: ours, plain PyTorch, torch.compile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Unrated
from bench.check import why_wrong
from bench.compiler import compiled
from bench.race import Clock, Job, Provider
from glf_fast import use_backend
from glf_fast.data import ImageDataset
from glf_fast.images import to_float
from glf_fast.training.config_files import load, preset_path
from glf_fast.training.trainer import Trainer

__all__ = ["IMAGES", "PROVIDERS", "PresetCase", "Step"]

IMAGES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}  # preset → its images


@dataclass(frozen=True)
class PresetCase(Unrated):
    """A preset's model on its images; `batch` 0 is the preset's own."""

    name: str
    batch: int = 0

    @property
    def sizes(self) -> dict[str, Any]:
        """In the job: the preset knows its batch."""
        return {}


class Step:
    """One provider's steps on a batch of noise: the arithmetic is the same for any image."""

    def __init__(self, name: str, preset: str, device: str = "cpu", batch: int = 0) -> None:
        self.backend = "auto" if name == "glf_fast" else "reference"
        config = load(preset_path(preset))
        config = replace(config, batch_size=batch or config.batch_size)
        torch.manual_seed(0)
        images = torch.randint(0, 256, (config.batch_size, *IMAGES[preset]), dtype=torch.uint8)
        self.images = images.to(device)
        self.trainer = Trainer(config, ImageDataset.of("noise", "train", images), torch.device(device))
        # The flow's data-dependent start, which torch.compile need not trace; then a little away from it, because there some
        # gradients are zero but for rounding.
        with torch.no_grad(), use_backend("reference"):
            self.trainer.model(to_float(self.images))
            for p in self._flow_parameters():
                p.add_(0.05 * torch.randn_like(p))
        self.exact = self._exact()
        if name == "compile":
            self.trainer.model = compiled(self.trainer.model)

    def run(self) -> dict[str, Tensor]:
        """A step; returns the losses."""
        with use_backend(self.backend):
            return self.trainer.step(self.images)

    def check(self, losses: dict[str, Tensor]) -> str:
        """Say what is wrong with the first step's loss, or the flow's gradients in it, or ""."""
        gradients = [p.grad for p in self._flow_parameters() if p.grad is not None]
        return why_wrong([losses["loss"], *gradients], self.exact)

    def _flow_parameters(self) -> list[nn.Parameter]:
        return self.trainer.model.parameter_groups()["flow"]

    def _exact(self) -> list[Tensor]:
        """The loss and the flow's gradients in float64, before the first step."""
        model = self.trainer.model
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with use_backend("reference"):
            loss = model.double().train()(to_float(self.images).double())["loss"]
            loss.backward()
        gradients = [p.grad for p in self._flow_parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        model.float().load_state_dict(weights)
        return [loss.detach(), *gradients]


def _job(name: str, case: PresetCase, mode: str, clock: Clock) -> Job:
    step = Step(name, case.name, clock.DEVICE, case.batch)
    batch = len(step.images)
    return Job(step.run, step.check, info={"batch": batch}, rate=("images", batch))


PROVIDERS = {name: Provider(name, partial(_job, name)) for name in ("glf_fast", "eager", "compile")}
