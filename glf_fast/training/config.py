"""The settings of a training run: their defaults, meaning and allowed values.

Each model declares its own settings (`models`). `config_files` reads files and presets, `arguments` the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from glf_fast import metrics, models, settings
from glf_fast.errors import did_you_mean
from glf_fast.models import ModelSettings
from glf_fast.settings import AT_LEAST_2, NOT_NEGATIVE, POSITIVE, Rule, Settings

__all__ = ["Config", "DataConfig", "OptimizerConfig", "ScoreConfig", "check", "default", "differences", "tables"]


@dataclass(frozen=True)
class DataConfig(Settings):
    """The data set."""

    source: str = "fashion-mnist"
    """A public data set's name (python -m glf_fast.data list), or a path: folder, .zip, .npy, .npz, .csv,
    .parquet, .smi or .txt."""
    image_size: int | None = None
    """Resize images to this many pixels a side; by default they keep their size."""
    skip_unusable: bool = False
    """Leave out files of a folder or zip that cannot be read as images; by default they are an error."""

    RULES: ClassVar[Mapping[str, Rule]] = {
        "source": (lambda value: bool(value.strip()), "a name or a path"),
        "image_size": POSITIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect, by name."""
        return {name: value for name, value in vars(self).items() if name != "skip_unusable" or value}


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """The optimizer and the schedule of its learning rate."""

    algorithm: Literal["adam", "adamax"] = "adam"
    """Algorithm: Adam, or Adamax, whose steps are divided by the largest gradient instead of the mean square."""
    lr: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running averages of gradients and of squared gradients."""
    eps: float = 1e-8
    """Number added to the denominator."""
    weight_decay: float = 0.0
    """Factor of an L2 penalty, which is added to the gradient."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises to lr."""
    schedule: Literal["steps", "cosine"] = "steps"
    """Schedule of the learning rate. steps: multiply by decay_factor after every decay_every epochs; cosine: fall to a
    hundredth of lr by the last epoch."""
    decay_every: int = 50
    """For schedule steps: epochs between two decays; 0: no decay."""
    decay_factor: float = 0.5
    """For schedule steps: factor of each decay of the learning rate."""
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
        without = {"decay_every", "decay_factor"} if self.schedule == "cosine" else set()
        if self.algorithm == "adam":  # files of earlier versions do not have it
            without.add("algorithm")
        return {name: value for name, value in vars(self).items() if name not in without}


@dataclass(frozen=True)
class ScoreConfig(Settings):
    """Fréchet distances during training and at its end, and other scores at its end."""

    extractors: tuple[str, ...] = ("tiny", "vgg16")
    """Feature networks: tiny, vgg16, vgg16-relu4_3, …, inception. The score by the first network decides which checkpoint is
    the best."""
    samples: int = 10_000
    """Generated images or sequences per score."""
    every: int = 10
    """Epochs between scores by the first extractor; 0: only at the end."""
    searches: int = 0
    """For sequences with an objective: Bayesian optimisations in the latent space at the end, each with its own seed."""
    scores: tuple[str, ...] = metrics.USUAL
    """For images, scores at the end: fd, kid, pr, is, prd, dc, msssim, critic, modes, nearest (docs/scores.md). The first three
    are always computed; fd, by which the best checkpoint is chosen, must be among them."""

    RULES: ClassVar[Mapping[str, Rule]] = {
        "extractors": (lambda value: len(value) > 0, "at least one name, for instance tiny"),
        "samples": AT_LEAST_2,
        "every": NOT_NEGATIVE,
        "searches": NOT_NEGATIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect, by name, without those that files of earlier versions do not have."""
        usual = {"searches": 0, "scores": metrics.USUAL}
        return {name: value for name, value in vars(self).items() if name not in usual or value != usual[name]}

    def mistake(self) -> str:
        """A message if a network or a score does not exist, or if there is no network for a score, else ""."""
        if wrong := [name for name in self.extractors if name not in metrics.names()]:
            hint = did_you_mean(wrong[0], metrics.names())
            return (
                f"extractors: there is no extractor {wrong[0]!r}; {hint}the extractors are {', '.join(metrics.names())}"
            )
        if own := [name for name in self.extractors if name in metrics.UNPUBLISHED]:
            return (
                f"extractors: the weights of {own[0]!r} cannot be given to a run; score its samples with python -m "
                "glf_fast.metrics calc"
            )
        if "fd" not in self.scores:
            return "scores must contain fd, which decides which checkpoint is the best"
        message = metrics.check_scores(self.scores, self.extractors)
        return f"scores: {message}" if message else ""


@dataclass(frozen=True)
class Config(Settings):
    """Everything that defines a run, except for what depends on the machine (folders, device)."""

    epochs: int = 100
    """Passes over the training data."""
    batch_size: int = 256
    """Images per step; an incomplete batch at the end of an epoch is left out."""
    seed: int = 0
    """Random seed: initial weights, image order, noise and samples."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of training. bf16: matrix products and convolutions in bfloat16 (autocast)."""
    ema: float = 0.0
    """Decay per step of an exponential average of the weights, which is then scored and sampled; 0: no average."""
    max_minutes: float = 0.0
    """Stop after this many minutes of training, counted over all resumes; 0: no limit."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; a checkpoint is always written at the end."""
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
    config = Config(model=kind.Settings(), optimizers={group: OptimizerConfig() for group in kind.groups})
    own = settings.tables(config.model)
    names = ["data", "model", "score", "optimizer", *own, *(f"{group}_optimizer" for group in kind.groups)]
    assert len(names) == len(set(names)), f"tables and groups of {model} have names that collide: {names}"
    assert not any(map(settings.tables, own.values())), f"tables of {model} must not hold tables"
    return config


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
    """`config` with its table `name` replaced."""
    if name in settings.tables(config.model):
        return replace(config, model=replace(config.model, **{name: table}))
    group = name.removesuffix("_optimizer")
    if name != group and group in config.optimizers:
        return replace(config, optimizers={**config.optimizers, group: table})
    return replace(config, **{name: table})


def check(config: Config) -> Config:
    """`config` itself; raises UserError for values out of range and for settings that would have no effect."""
    settings.check(config, nested=False)
    for name, table in tables(config).items():
        settings.check(table, f"{name}.", nested=False)
    return config


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value in a, value in b)} where two configurations differ; keys of only one configuration are left out."""
    other = dict(_flat(b))
    return {key: (value, other[key]) for key, value in _flat(a) if key in other and value != other[key]}


def _flat(config: Config) -> Iterator[tuple[str, Any]]:
    yield from scalars(config).items()
    for name, table in tables(config).items():
        for key, value in vars(table).items():
            if not isinstance(value, Settings):
                yield f"{name}.{key}", value
