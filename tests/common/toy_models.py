"""Tiny models that train in phases or in stages, for 8 × 8 images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from glf_fast.models import GenerativeModel, ModelSettings, Phase, Stage, Words
from glf_fast.models.whole_batch import noise_like

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class AdversarialSettings(ModelSettings):
    """A generator against a discriminator."""

    name: str = "adversarial"
    """Name of the model."""
    latent_dim: int = 4
    """Numbers in a code."""
    dropout: float = 0.0
    """Probability with which the discriminator does not see a pixel."""


class Adversarial(GenerativeModel):
    """Two networks that learn from two losses in turn; the generator at every second step."""

    Settings = AdversarialSettings
    groups = ("discriminator", "generator")
    words = Words("Toy GAN")

    def __init__(self, shape: Sequence[int], settings: AdversarialSettings) -> None:
        super().__init__(shape, settings)
        self.generator = nn.Sequential(nn.Linear(settings.latent_dim, 16), nn.ReLU(), nn.Linear(16, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
        self.dropout = nn.Dropout(settings.dropout)

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        like = self.generator[0].weight.new_empty(n, self.settings.latent_dim)
        return self.generator(noise_like(like, generator))

    def discriminate(self, x: Tensor, generator: torch.Generator | None = None) -> Losses:
        false = self.discriminator(self.draw(len(x), generator))
        return {"discriminator": (softplus(-self.discriminator(self.dropout(x.flatten(1)))) + softplus(false)).mean()}

    def deceive(self, x: Tensor, generator: torch.Generator | None = None) -> Losses:
        return {"generator": softplus(-self.discriminator(self.draw(len(x), generator))).mean()}

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(self.discriminate, moves=("discriminator",), minimises="discriminator"),
            Phase(self.deceive, moves=("generator",), minimises="generator", every=2),
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {name: list(getattr(self, name).parameters()) for name in self.groups}

    def sample(self, n: int, *, temperature: float = 1.0, generator=None, mode: str = "") -> Tensor:
        with self.evaluating():
            return self.draw(n, generator).unflatten(1, self.shape)


@dataclass(frozen=True)
class StagedSettings(ModelSettings):
    """An autoencoder, then a normal distribution on its codes."""

    name: str = "staged"
    """Name of the model."""
    density: str = "gradient"
    """gradient, closed or joint: how the distribution is fitted; joint: the encoder changes meanwhile."""
    density_epochs: int = 2
    """gradient: passes over the codes."""


class Staged(GenerativeModel):
    """A linear autoencoder, then a diagonal normal distribution that is fitted to the codes of the training set."""

    Settings = StagedSettings
    groups = ("autoencoder", "density")
    words = Words("Toy in two stages")

    def __init__(self, shape: Sequence[int], settings: StagedSettings) -> None:
        super().__init__(shape, settings)
        self.encoder, self.decoder = nn.Linear(64, 4), nn.Linear(4, 64)
        self.mean, self.log_std = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x.flatten(1))

    def rebuild(self, x: Tensor, generator: torch.Generator | None = None) -> Losses:
        return {"loss": (self.decoder(self.encode(x)) - x.flatten(1)).square().sum(1).mean()}

    def likelihood(self, z: Tensor, generator: torch.Generator | None = None) -> Losses:
        return {"loss": (self.log_std + 0.5 * ((z - self.mean) / self.log_std.exp()).square()).sum(1).mean()}

    def both(self, z: Tensor, generator: torch.Generator | None = None) -> Losses:
        return {"loss": self.likelihood(z)["loss"] + self.encoder.weight.square().sum()}

    def fit(self, z: Tensor) -> None:
        self.mean.copy_(z.mean(0))
        self.log_std.copy_(z.std(0).log())

    def stages(self) -> tuple[Stage, ...]:
        first = Stage((Phase(self.rebuild, moves=("autoencoder",)),))
        if self.settings.density == "closed":
            return first, Stage(inputs=self.encode, fit=self.fit)
        phases = (Phase(self.likelihood, moves=("density",)),)
        if self.settings.density == "joint":
            phases = (Phase(self.both, moves=self.groups),)
        return first, Stage(phases, epochs=self.settings.density_epochs, inputs=self.encode)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        autoencoder = [*self.encoder.parameters(), *self.decoder.parameters()]
        return {"autoencoder": autoencoder, "density": [self.mean, self.log_std]}

    def sample(self, n: int, *, temperature: float = 1.0, generator=None, mode: str = "") -> Tensor:
        with self.evaluating():
            z = self.mean + temperature * self.log_std.exp() * torch.randn(n, 4, generator=generator)
            return self.decoder(z).unflatten(1, self.shape).clamp(0, 1)


@dataclass(frozen=True)
class RowsSettings(ModelSettings):
    """A normal distribution of rows."""

    name: str = "rows"
    """Name of the model."""


class Rows(GenerativeModel):
    """A diagonal normal distribution of the rows of a table."""

    Settings = RowsSettings
    groups = ("density",)
    words = Words("Toy of rows")
    takes = frozenset({"table"})

    def __init__(self, shape: Sequence[int], settings: RowsSettings) -> None:
        super().__init__(shape, settings)
        self.mean, self.log_std = nn.Parameter(torch.zeros(self.shape)), nn.Parameter(torch.zeros(self.shape))

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> Losses:
        return {"loss": (self.log_std + 0.5 * ((x - self.mean) / self.log_std.exp()).square()).sum(1).mean()}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self.losses, moves=("density",)),)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"density": [self.mean, self.log_std]}

    def sample(self, n: int, *, temperature: float = 1.0, generator=None, mode: str = "") -> Tensor:
        return self.mean + temperature * self.log_std.exp() * torch.randn(n, *self.shape, generator=generator)
