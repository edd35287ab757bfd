"""Glow: a normalizing flow on pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glf_fast.flow import GlowFlow
from glf_fast.models.arc import arc
from glf_fast.models.model import GenerativeModel, ModelSettings, Phase, Stage, Words
from glf_fast.models.whole_batch import noise_like
from glf_fast.settings import NOT_NEGATIVE, POSITIVE, Rule, shown

__all__ = ["Glow", "GlowSettings"]

# Images that go through the flow at once where there are no gradients: 512 channels of 128 images of 16 × 16 pixels are 67 MB.
_BATCH = 128
# A class is a channel of every network's input, and a pass of the flow for the likelihood of an image.
_MOST_CLASSES = 1000
_OF_AFFINE = ("log_scale", "log_scale_constant", "add_first")
_OF_CLASSES = ("classes", "class_sizes")


@dataclass(frozen=True)
class GlowSettings(ModelSettings):
    """Glow, a flow on pixels."""

    name: str = "glow"
    """Name of the model."""
    levels: int = 3
    """Levels L: each one halves the sides of the image, which must be multiples of 2^levels."""
    steps: int = 32
    """Steps K of each level: ActNorm, 1 × 1 convolution, coupling."""
    width: int = 512
    """Channels of the hidden layers in the couplings' networks."""
    n_bits: int = 8
    """Bits of a pixel that are modelled: 8, or fewer for images of fewer grey levels, as 5 in the paper for large images."""
    coupling: Literal["affine", "additive"] = "affine"
    """Couplings: v·e^s + t (affine), or v + t (additive)."""
    masks: Literal["channels", "realnvp"] = "channels"
    """Masks of the couplings: Glow's halves of the channels, or RealNVP's, also checkerboards, for an even number of steps."""
    linear: Literal["plu", "dense", "permutation"] = "plu"
    """For masks channels: parametrisation of the 1 × 1 convolutions; the released code has dense ones."""
    log_scale: str = "tanh"
    """For coupling affine: the function that gives the log-scales: tanh, exp, glow, …; the released code has glow, σ(u + 2)."""
    log_scale_constant: float | None = None
    """For coupling affine: constant of the log-scale function; by default the usual constant of the function."""
    add_first: bool = False
    """For coupling affine: compute (v + t)·e^s instead of v·e^s + t, as the released code does."""
    gain_factor: float = 3.0
    """Factor of the log-gains of the networks' outputs, which learn so many times as fast; 0: no gains."""
    reversible: bool = False
    """Rebuild activations in the backward: the memory of one step, for a third more time."""
    conditional: bool = False
    """Learn the density of each class of the data's labels, given to all networks in one-hot form."""
    classes: tuple[int, ...] = ()
    """For a conditional model: labels of the classes; by default those of the training set."""
    class_sizes: tuple[int, ...] = ()
    """For a conditional model: numbers of training images of the classes, in whose proportion classes are sampled."""

    CHOICE: ClassVar[str] = "coupling"
    RULES: ClassVar[dict[str, Rule]] = {
        "levels": (lambda value: 0 < value <= 12, "between 1 and 12"),
        "steps": (lambda value: 0 < value <= 1000, "between 1 and 1000"),
        "width": POSITIVE,
        "n_bits": (lambda value: 1 <= value <= 8, "between 1 and 8"),
        "class_sizes": (lambda value: all(size > 0 for size in value), "positive"),
        "gain_factor": NOT_NEGATIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with this coupling and these masks, by name."""
        without: tuple[str, ...] = _OF_AFFINE if self.coupling == "additive" else ()
        # Files of earlier versions do not have masks and conditional, which stay out where they change nothing.
        without += ("linear",) if self.masks == "realnvp" else ("masks",)
        if not self.conditional:
            without += ("conditional", *_OF_CLASSES)
        return {name: value for name, value in super().effective().items() if name not in without}

    def choice(self, name: str) -> str:
        """The field that decides whether the field `name` has an effect."""
        return "conditional" if name in _OF_CLASSES else "masks" if name == "linear" else "coupling"

    def mistake(self) -> str:
        """A message if the flow cannot be built with these settings, else ""."""
        if len(self.classes) != len(self.class_sizes) or sorted(set(self.classes)) != list(self.classes):
            return "classes and class_sizes are those of the training set; leave both out"
        try:
            with torch.random.fork_rng(devices=[]):
                replace(self, levels=1, steps=min(self.steps, 2), width=1).build((1, 2, 2))
        except ValueError as error:
            return str(error)
        return ""

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"L {self.levels}, K {self.steps}, width {self.width}, {self.coupling}, {self.n_bits} bits"

    def trained_on(self, train: Any) -> GlowSettings:
        """These settings with the classes of the training set.

        Raises:
            ValueError: a conditional model, and data without labels, of too many, or of others than `classes`.
        """
        labels = train.labels
        if not self.conditional:
            return self
        if labels is None:
            raise ValueError("model.conditional needs a label for each image, and these data have none; leave it out")
        classes, sizes = (tuple(found.tolist()) for found in labels.unique(return_counts=True))
        if len(classes) > _MOST_CLASSES:
            raise ValueError(f"model.conditional takes labels of at most {_MOST_CLASSES} classes; got {len(classes)}")
        if self.classes not in ((), classes):
            raise ValueError(
                f"model.classes are {shown(self.classes)}, those of the data {shown(classes)}; leave them out"
            )
        return replace(self, classes=classes, class_sizes=sizes)

    def build(self, shape: Sequence[int]) -> GlowFlow:
        """The flow on images (C, H, W), given a class in one-hot form if there are classes."""
        of_model = ("name", "n_bits", "conditional", *_OF_CLASSES)
        options = {name: value for name, value in self.effective().items() if name not in of_model}
        return GlowFlow(shape, context_dim=len(self.classes), **options)  # type: ignore[arg-type]


class Glow(GenerativeModel):
    """Glow (Kingma and Dhariwal, arXiv:1807.03039): the density of images themselves.

    A pixel of level k = 0 … 2ⁿ − 1 becomes y = (k + u)/2ⁿ − ½ with u uniform in [0, 1). The loss is the number of bits per
    dimension that the flow's density p needs at most to code the levels (Theis et al., arXiv:1511.01844, section 3.1),

        n − mean log₂ p(y) / D,        log p(y) = log N(z; 0, I) + log|det ∂z/∂y|,  z = flow(y),  D = C·H·W.

    A conditional model learns p(y | c) of the classes c, whose shares π_c are those of the training set: then
    p(y) = Σ_c π_c p(y | c), samples have classes in these shares, and the code of an image is its noise, given the class c of
    largest π_c p(y | c), with this class in one-hot form behind it.

    Args:
        shape: (C, H, W) of the images, H and W multiples of 2^levels.
        settings: see `GlowSettings`. With fewer than 8 bits, levels are the highest bits of a pixel.
    """

    Settings = GlowSettings
    groups = ("flow",)
    words = Words(
        title="Glow",
        interpolations="From one test image to another along an arc in the flow's Gaussian space.",
        curves={"bits_per_dim": "bits per dimension"},
        about_curves="Bits per dimension of the training images, with the noise of a batch: an upper bound on the code length.",
    )
    settings: GlowSettings

    def __init__(self, shape: Sequence[int], settings: GlowSettings = GlowSettings()) -> None:
        super().__init__(shape, settings)
        if len(self.shape) != 3:
            raise ValueError(f"shape must be (channels, height, width) of an image; got {self.shape}")
        if settings.conditional and not settings.classes:
            raise ValueError("a conditional model needs the labels and sizes of its classes, classes and class_sizes")
        self.flow = settings.build(self.shape)
        self._labels: Tensor
        self._log_shares: Tensor
        self.register_buffer("_labels", torch.tensor(settings.classes, dtype=torch.int64), persistent=False)
        sizes = torch.tensor(settings.class_sizes, dtype=torch.float32)
        self.register_buffer("_log_shares", (sizes / sizes.sum()).log(), persistent=False)
        if settings.n_bits < 8:
            less = 8 - settings.n_bits
            self.words = replace(
                self.words,
                likelihood=f"of 8 bits; the images of {settings.n_bits} bits that are modelled need {less} less",
            )

    @property
    def classes(self) -> tuple[int, ...]:
        """Labels of the classes of a conditional model, in the order of the context's columns; () for any other."""
        return self.settings.classes

    # -- training ------------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"flow": all parameters}."""
        return {"flow": list(self.parameters())}

    def phases(self) -> tuple[Phase, ...]:
        """A single phase, which trains the flow by its likelihood."""
        return (Phase(self.losses, moves=self.groups),)

    def stages(self) -> tuple[Stage, ...]:
        """A single stage, with labels for a conditional model."""
        return (Stage(self.phases(), labelled=self.settings.conditional),)

    def losses(
        self, x: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Scalars of a batch x (B, C, H, W) in [0, 1].

        Args:
            generator: source of the noise u, on x's device; the global one if None.
            labels: for a conditional model, the classes (B,) of x.

        Returns:
            loss, bits_per_dim: both the bits per dimension of n-bit images, given their classes if there are any; the loss is
                to be back-propagated.
        """
        self._check_batch("x", x)
        noise = noise_like(x, generator, torch.rand)
        context = self._one_hot(labels, x) if self.classes else None
        bits = self._bits(self.flow.log_prob(self._dequantised(255 / 256 * x + 0.5 / 256, noise), context)).mean()
        return {"loss": bits, "bits_per_dim": bits.detach()}

    def _dequantised(self, x: Tensor, noise: Tensor) -> Tensor:
        """y of x in [0, 1), where level k of 8 bits lies between k/256 and (k + 1)/256."""
        levels = 2**self.settings.n_bits
        return ((x * levels).floor().clamp(0, levels - 1) + noise) / levels - 0.5

    def _one_hot(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """Labels (B,) as contexts (B, classes)."""
        if labels is None:
            raise ValueError(f"this {self.words.title} is conditional: give a label for each of {len(like)} images")
        found = labels[:, None] == self._labels
        return found.to(like.dtype) / found.any(1, keepdim=True)  # NaN for no class, as a GPU is not waited for

    def _bits(self, log_prob: Tensor) -> Tensor:
        return self.settings.n_bits - log_prob / (math.log(2) * math.prod(self.shape))

    # -- use -----------------------------------------------------------------------------------------------------------

    def log_likelihood(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """log p(x) (B,) in nats of x (B, C, H, W) in [0, 1], whose level k of 8 bits is anywhere in [k, k + 1)/256.

        With fewer than 8 bits, the density of a level is the mean of p over the level; a bound of it, by noise of the
        generator, is returned.
        """
        self._check_batch("x", x)
        if self.settings.n_bits < 8:
            x = self._dequantised(x, torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)) + 0.5
        with self.evaluating():
            return torch.cat([self._joint(part - 0.5).logsumexp(1) for part in x.split(_BATCH)])

    def _joint(self, y: Tensor) -> Tensor:
        """log π_c + log p(y | c) (B, classes) of y (B, C, H, W); (B, 1) of a model without classes."""
        if not self.classes:
            return self.flow.log_prob(y)[:, None]
        contexts = torch.eye(len(self.classes), dtype=y.dtype, device=y.device)
        return torch.stack([self.flow.log_prob(y, context) for context in contexts], 1) + self._log_shares

    def encode(self, x: Tensor) -> Tensor:
        """Codes of images x (B, C, H, W) in [0, 1], in eval mode: the noise of the middle of each level.

        Returns:
            The noise (B, C, H, W); of a conditional model (B, C·H·W + classes), with the most likely class behind the noise.
        """
        self._check_batch("x", x)
        middle = 255 / 256 * x + 0.5 / 256
        if self.settings.n_bits < 8:
            middle = self._dequantised(middle, torch.full_like(x, 0.5)) + 0.5
        with self.evaluating():
            return torch.cat([self._code(part - 0.5) for part in middle.split(_BATCH)])

    def _code(self, y: Tensor) -> Tensor:
        if not self.classes:
            return self.flow(y)[0]
        context = self._one_hot(self._labels[self._joint(y).argmax(1)], y)
        return torch.cat([self.flow(y, context)[0].flatten(1), context], 1)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of codes z as `encode` gives them, in eval mode."""
        with self.evaluating():
            return self._pixels(torch.cat([self.flow.inverse(*self._divided(part))[0] for part in z.split(_BATCH)]))

    def _divided(self, code: Tensor) -> tuple[Tensor, Tensor | None]:
        """Noise (B, C, H, W), and context (B, classes) if there are classes, of a code."""
        noise, context = code.flatten(1).tensor_split([math.prod(self.shape)], 1)
        return noise.unflatten(1, self.shape), context if self.classes else None

    def _pixels(self, y: Tensor) -> Tensor:
        """Images in [0, 1] of y: of the levels of n bits; those of 8 bits are left to who stores the image."""
        levels = 2**self.settings.n_bits
        k = (y + 0.5) * levels - 0.5
        if self.settings.n_bits < 8:
            k = k.round()
        return (k / (levels - 1)).clamp(0, 1)

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n images (n, C, H, W) in [0, 1], in eval mode and without gradients.

        Args:
            temperature: standard deviation of the noise; 0.7 gives more typical, less varied images.
            generator: source of the noise, on the model's device; the global generator if None.
            mode: "": there are no others.
        """
        self.check_mode(mode)
        if not self.classes:
            return self._sample(n, None, temperature, generator)
        if not n:
            return self.sample_classes(self._labels[:0])
        chosen = torch.multinomial(self._log_shares.exp(), n, replacement=True, generator=generator)
        return self.sample_classes(self._labels[chosen], temperature=temperature, generator=generator)

    def sample_classes(
        self, labels: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """An image of each class in labels (B,): (B, C, H, W) in [0, 1]; arguments as of `sample`.

        Raises:
            ValueError: a label that is no class of this model.
        """
        if wrong := set(labels.tolist()) - set(self.classes):
            raise ValueError(f"labels must be among {shown(self.classes)}; got {shown(sorted(wrong))}")
        return self._sample(len(labels), self._one_hot(labels, self._log_shares), temperature, generator)

    def _sample(self, n: int, context: Tensor | None, temperature: float, generator: torch.Generator | None) -> Tensor:
        made = []
        with self.evaluating():
            for start in range(0, n, _BATCH) or [0]:
                size, part = min(_BATCH, n - start), None if context is None else context[start : start + _BATCH]
                made.append(self.flow.sample(size, part, temperature=temperature, generator=generator))
            return self._pixels(torch.cat(made))

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """Images (B, steps, C, H, W) of an arc through the noise, from each x0 to its x1 (B, C, H, W) in [0, 1].

        Of a conditional model, the class goes straight from that of x0 to that of x1.
        """
        if steps < 2:
            raise ValueError(f"steps counts both ends, so steps must be ≥ 2; got {steps}")
        D = math.prod(self.shape)
        a, b = self.encode(x0).flatten(1), self.encode(x1).flatten(1)
        t = torch.linspace(0, 1, steps, device=a.device, dtype=a.dtype)[:, None]
        z = torch.cat([arc(a[:, :D], b[:, :D], steps), torch.lerp(a[:, None, D:], b[:, None, D:], t)], 2)
        return self.decode(z.flatten(0, 1)).unflatten(0, (len(x0), steps))
