"""The settings of a training run: what can be chosen, what it means, and what is out of range.

The model's settings are the model's own (`models`). Files and presets: `config_files`. Command line: `arguments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from glf_fast import models, settings
from glf_fast.models import ModelSettings
from glf_fast.settings import AT_LEAST_2, NOT_NEGATIVE, POSITIVE, Rule, Settings

__all__ = ["Config", "DataConfig", "OptimizerConfig", "ScoreConfig", "check", "default", "differences", "tables"]


@dataclass(frozen=True)
class DataConfig(Settings):
    """The data set."""

    source: str = "fashion-mnist"
    """A public data set's name (python -m glf_fast.data list), or a path: folder, .zip, .npy, .npz, .csv or .parquet."""
    image_size: int | None = None
    """Resize images to this many pixels a side; by default they keep their size."""
    skip_unusable: bool = False
    """Leave out files of a folder or zip that cannot be read as images; by default they are an error."""

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect, by name."""
        return {name: value for name, value in vars(self).items() if name != "skip_unusable" or value}


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """Adam and its schedule."""

    lr: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running averages of gradients and of squared gradients."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises to lr."""
    schedule: Literal["steps", "cosine"] = "steps"
    """steps: multiply by decay_factor after every decay_every epochs; cosine: fall to a hundredth of lr at the last epoch."""
    decay_every: int = 50
    """steps: epochs between two decays; 0: no decay."""
    decay_factor: float = 0.5
    """steps: factor of each decay of the learning rate."""
    clip: float = 0.0
    """Clip the group's gradient norm to this value; 0: no clipping."""

    CHOICE: ClassVar[str] = "schedule"
    RULES: ClassVar[Mapping[str, Rule]] = {
        "lr": NOT_NEGATIVE,
        "betas": (lambda value: all(0 <= beta < 1 for beta in value), "in [0, 1)"),
        "eps": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "warmup_steps": NOT_NEGATIVE,
        "decay_every": NOT_NEGATIVE,
        "decay_factor": POSITIVE,
        "clip": NOT_NEGATIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with this schedule, by name."""
        without = ("decay_every", "decay_factor") if self.schedule == "cosine" else ()
        return {name: value for name, value in vars(self).items() if name not in without}


@dataclass(frozen=True)
class ScoreConfig(Settings):
    """Fréchet distances during training and at its end."""

    extractors: tuple[str, ...] = ("tiny", "vgg16")
    """Feature networks: tiny, vgg16, vgg16-relu4_3, …, inception. The first one decides which checkpoint is the best."""
    samples: int = 10_000
    """Generated images per score."""
    every: int = 10
    """Epochs between scores by the first extractor; 0: only at the end."""

    RULES: ClassVar[Mapping[str, Rule]] = {
        "extractors": (lambda value: len(value) > 0, "at least one name, for instance tiny"),
        "samples": AT_LEAST_2,
        "every": NOT_NEGATIVE,
    }


@dataclass(frozen=True)
class Config(Settings):
    """Everything that defines a run; what the machine adds (folders, device) is not part of it."""

    epochs: int = 100
    """Passes over the training data."""
    batch_size: int = 256
    """Images per step; images that do not fill a batch at the end of an epoch are left out."""
    seed: int = 0
    """Random seed: initial weights, image order, noise and samples."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products and convolutions in bfloat16 (autocast)."""
    ema: float = 0.0
    """Decay per step of the averaged weights, which are then scored and sampled; 0: no average."""
    max_minutes: float = 0.0
    """Stop after this many minutes of training, counted over all resumes; 0: no limit."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; there is always one at the end."""
    pictures_every: int = 1
    """Epochs between pictures."""
    data: DataConfig = DataConfig()
    model: ModelSettings = ModelSettings()  # noqa: RUF009 - frozen
    optimizers: Mapping[str, OptimizerConfig] = field(default_factory=dict)
    score: ScoreConfig = ScoreConfig()

    RULES: ClassVar[Mapping[str, Rule]] = {
        "epochs": POSITIVE,
        "batch_size": AT_LEAST_2,
        "ema": (lambda value: 0 <= value < 1, "in [0, 1)"),
        "max_minutes": NOT_NEGATIVE,
        "checkpoint_minutes": NOT_NEGATIVE,
        "pictures_every": POSITIVE,
    }


def default(model: str) -> Config:
    """The default settings of a run with this model; raises UserError if there is no such model."""
    kind = models.kind(model)
    return Config(model=kind.Settings(), optimizers={group: OptimizerConfig() for group in kind.groups})


def tables(config: Config) -> dict[str, Settings]:
    """The tables of a configuration file by name, in their order: the model's own tables stand beside `model`."""
    return {
        "data": config.data,
        "model": config.model,
        **settings.tables(config.model),
        **{f"{group}_optimizer": optimizer for group, optimizer in config.optimizers.items()},
        "score": config.score,
    }


def scalars(config: Config) -> dict[str, Any]:
    """The settings that are in no table, by name."""
    return {key: value for key, value in vars(config).items() if not isinstance(value, (Settings, Mapping))}


def with_table(config: Config, name: str, table: Any) -> Config:
    """`config` with another table in the place of the one called `name`."""
    if name in settings.tables(config.model):
        return replace(config, model=replace(config.model, **{name: table}))
    if (group := name.removesuffix("_optimizer")) in config.optimizers:
        return replace(config, optimizers={**config.optimizers, group: table})
    return replace(config, **{name: table})


def check(config: Config) -> Config:
    """`config` itself; raises UserError for values out of range and for settings that would have no effect."""
    settings.check(config, nested=False)
    for name, table in tables(config).items():
        settings.check(table, f"{name}.", nested=False)
    return config


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value in a, value in b)} where two configurations differ; keys that only one has are left out."""
    other = dict(_flat(b))
    return {key: (value, other[key]) for key, value in _flat(a) if key in other and value != other[key]}


def _flat(config: Config) -> Iterator[tuple[str, Any]]:
    yield from scalars(config).items()
    for name, table in tables(config).items():
        for key, value in vars(table).items():
            if not isinstance(value, Settings):
                yield f"{name}.{key}", value
