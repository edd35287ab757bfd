"""A training run's settings as frozen dataclasses: what there is to choose, what it means, and what is out of range.

Files and presets: `config_files`. Command line: `command_line`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from glf_fast.errors import UserError

__all__ = [
    "Config",
    "DataConfig",
    "FlowConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScoreConfig",
    "check",
    "differences",
    "shown",
]


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    source: str = "fashion-mnist"
    """fashion-mnist, mnist, cifar10, celeba, digits, or the path of a folder, a zip, an .npy or .npz file."""
    image_size: int | None = None
    """Resize to this many pixels a side; by default as the source has them."""


@dataclass(frozen=True)
class ModelConfig:
    """The model; its flow has a table of its own."""

    name: str = "glf"
    """Which model."""
    latent_dim: int = 20
    """Numbers in a code."""
    width: int = 64
    """Channels after the encoder's first convolution."""
    hidden: int = 1024
    """Units of the encoder's and the decoder's dense layer."""
    reconstruction: Literal["mse", "bce", "l1", "perceptual"] = "mse"
    """How images and their reconstructions are compared."""
    beta: float = 1.0
    """Weight of the reconstruction against the likelihood; matters when the gradient is not stopped."""
    stop_gradient: bool = True
    """Train the encoder by reconstruction alone, not by the flow's likelihood."""
    latent_noise: float = 0.0
    """Standard deviation of the noise on codes in training, in units of the codes' own."""


@dataclass(frozen=True)
class FlowConfig:
    """The normalizing flow."""

    kind: Literal["coupling", "rnvp"] = "coupling"
    """coupling: Glow's steps (ActNorm, linear, coupling); rnvp: the GLF paper's blocks."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers in the couplings' networks; for rnvp two equal ones."""
    steps: int = 8
    """coupling: number of steps."""
    activation: str = "relu"
    """coupling: relu, leaky_relu, silu, gelu, tanh or elu."""
    log_scale: str = "tanh"
    """coupling: the function that bounds log-scales: tanh, exp, glow, nflows, atan, softclip or jet."""
    log_scale_constant: float | None = None
    """coupling: that function's constant; by default its usual one."""
    add_first: bool = False
    """coupling: (v + t)·e^s instead of v·e^s + t."""
    linear: Literal["plu", "dense", "permutation"] = "plu"
    """coupling: the linear layer between couplings."""
    actnorm: bool = True
    """coupling: begin each step with an ActNorm."""
    blocks: int = 4
    """rnvp: number of two-sided blocks."""
    clamp: float = 2.0
    """rnvp: bound of the log-scales."""
    seed: int = 0
    """rnvp: of the fixed permutations and the start."""

    def settings(self) -> dict[str, Any]:
        """The fields that mean something for this kind, by name."""
        shared = ("kind", "hidden")
        rnvp = ("blocks", "clamp", "seed")
        return {
            name: value
            for name, value in vars(self).items()
            if name in shared or (name in rnvp) == (self.kind == "rnvp")
        }


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its schedule."""

    lr: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of gradients and of their squares."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises to lr."""
    schedule: Literal["steps", "cosine"] = "steps"
    """steps: multiply by decay_factor after every decay_every epochs; cosine: fall to a hundredth of lr at the last epoch."""
    decay_every: int = 50
    """steps: epochs; 0: never."""
    decay_factor: float = 0.5
    """steps: what the learning rate is multiplied by."""
    clip: float = 0.0
    """Longest gradient (norm over the whole group) let through unscaled; 0: no limit."""

    def settings(self) -> dict[str, Any]:
        """The fields that mean something for this schedule, by name."""
        without = ("decay_every", "decay_factor") if self.schedule == "cosine" else ()
        return {name: value for name, value in vars(self).items() if name not in without}


@dataclass(frozen=True)
class ScoreConfig:
    """Fréchet distances during training and at its end."""

    extractors: tuple[str, ...] = ("tiny", "vgg16")
    """Feature networks: tiny, vgg16, vgg16-relu4_3, …, inception. The first one decides which checkpoint is the best."""
    samples: int = 10_000
    """Generated images per score."""
    every: int = 10
    """Epochs between scores by the first extractor; 0: only at the end."""


@dataclass(frozen=True)
class Config:
    """Everything that defines a run; what the machine adds (folders, device) is not part of it."""

    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 256
    """Images per step; what does not fill a batch at an epoch's end is left out."""
    seed: int = 0
    """Of the start, the order of images, the noise and the samples."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products and convolutions in bfloat16 (autocast)."""
    ema: float = 0.0
    """Decay per step of the averaged weights that are then scored and sampled; 0: no average."""
    max_minutes: float = 0.0
    """Stop after so many minutes of training, counted over all resumes; 0: no limit."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; there is always one at the end."""
    pictures_every: int = 1
    """Epochs between pictures."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    autoencoder_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    flow_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def model_arguments(self, image_shape: tuple[int, ...]) -> dict[str, Any]:
        """What `models.build` wants for images of this shape (C, H, W); JSON-ready."""
        flow = self.flow.settings()
        flow["hidden"] = list(self.flow.hidden) if self.flow.kind == "coupling" else self.flow.hidden[0]
        model = {key: value for key, value in vars(self.model).items() if key != "name"}
        return {"image_shape": list(image_shape), **model, "flow": flow}


# Values that their types cannot rule out.
_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda value: value > 0, "positive")
_NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (lambda value: value >= 0, "0 or more")
_AT_LEAST_2: tuple[Callable[[Any], bool], str] = (lambda value: value >= 2, "2 or more")
_OPTIMIZER = {
    "lr": _NOT_NEGATIVE,
    "betas": (lambda value: all(0 <= beta < 1 for beta in value), "in [0, 1)"),
    "eps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "decay_every": _NOT_NEGATIVE,
    "decay_factor": _POSITIVE,
    "clip": _NOT_NEGATIVE,
}
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": _POSITIVE,
    "batch_size": _AT_LEAST_2,
    "ema": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "max_minutes": _NOT_NEGATIVE,
    "checkpoint_minutes": _NOT_NEGATIVE,
    "pictures_every": _POSITIVE,
    "model.latent_dim": _POSITIVE,
    "model.width": _POSITIVE,
    "model.hidden": _POSITIVE,
    "model.beta": _POSITIVE,
    "model.latent_noise": _NOT_NEGATIVE,
    "flow.hidden": (lambda value: len(value) > 0 and min(value) > 0, "one or more positive widths"),
    "flow.steps": _POSITIVE,
    "flow.blocks": _POSITIVE,
    "flow.clamp": _POSITIVE,
    "score.extractors": (lambda value: len(value) > 0, "at least one name, for instance tiny"),
    "score.samples": _AT_LEAST_2,
    "score.every": _NOT_NEGATIVE,
    **{f"{group}_optimizer.{key}": rule for group in ("autoencoder", "flow") for key, rule in _OPTIMIZER.items()},
}


def check(config: Config) -> Config:
    """`config` itself; raises UserError for values out of range and for settings that would have no effect."""
    for key, value in _flat(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} = {value} must be finite")
        if key in _RULES and not _RULES[key][0](value):
            raise UserError(f"{key} = {shown(value)} must be {_RULES[key][1]}")
    for name, table in vars(config).items():
        if isinstance(table, (FlowConfig, OptimizerConfig)):
            for key, (default, value) in differences(type(table)(), table).items():
                if key not in table.settings():
                    choice = "kind" if isinstance(table, FlowConfig) else "schedule"
                    raise UserError(
                        f"{name}.{key} = {shown(value)} means nothing for {name}.{choice} = {shown(getattr(table, choice))}; "
                        f"set it to {shown(default)}, its default, where it is set (a preset, a file or the command line)"
                    )
    widths = config.flow.hidden
    if config.flow.kind == "rnvp" and (len(widths) != 2 or widths[0] != widths[1]):
        raise UserError(f'flow.hidden = {shown(widths)} must be two equal widths for flow.kind = "rnvp"')
    return config


def differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value in a, value in b)} where the two differ."""
    other = dict(_flat(b))
    return {key: (value, other[key]) for key, value in _flat(a) if value != other[key]}


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def shown(value: Any) -> str:
    """A value as the user would write it in a file."""
    return json.dumps(value, default=str, ensure_ascii=False)
