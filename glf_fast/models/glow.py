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
from glf_fast.models.model import GenerativeModel, ModelSettings, Phase, Words
from glf_fast.models.whole_batch import noise_like
from glf_fast.settings import NOT_NEGATIVE, POSITIVE, Rule

__all__ = ["Glow", "GlowSettings"]

# Images that go through the flow at once where there are no gradients: 512 channels of 128 images of 16 × 16 pixels are 67 MB.
_BATCH = 128


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
    linear: Literal["plu", "dense", "permutation"] = "plu"
    """Parametrisation of the 1 × 1 convolutions; the released code has dense ones."""
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

    CHOICE: ClassVar[str] = "coupling"
    RULES: ClassVar[dict[str, Rule]] = {
        "levels": (lambda value: 0 < value <= 12, "between 1 and 12"),
        "steps": (lambda value: 0 < value <= 1000, "between 1 and 1000"),
        "width": POSITIVE,
        "n_bits": (lambda value: 1 <= value <= 8, "between 1 and 8"),
        "gain_factor": NOT_NEGATIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with this coupling, by name."""
        without = ("log_scale", "log_scale_constant", "add_first") if self.coupling == "additive" else ()
        return {name: value for name, value in super().effective().items() if name not in without}

    def mistake(self) -> str:
        """A message if the flow cannot be built with these settings, else ""."""
        try:
            with torch.random.fork_rng(devices=[]):
                replace(self, levels=1, steps=1, width=1).build((1, 2, 2))
        except ValueError as error:
            return str(error)
        return ""

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"L {self.levels}, K {self.steps}, width {self.width}, {self.coupling}, {self.n_bits} bits"

    def build(self, shape: Sequence[int]) -> GlowFlow:
        """The flow on images (C, H, W)."""
        of_model = ("name", "n_bits")
        return GlowFlow(shape, **{name: value for name, value in self.effective().items() if name not in of_model})  # type: ignore[arg-type]


class Glow(GenerativeModel):
    """Glow (Kingma and Dhariwal, arXiv:1807.03039): the density of images themselves.

    A pixel of level k = 0 … 2ⁿ − 1 becomes y = (k + u)/2ⁿ − ½ with u uniform in [0, 1). The loss is the number of bits per
    dimension that the flow's density p needs at most to code the levels (Theis et al., arXiv:1511.01844, section 3.1),

        n − mean log₂ p(y) / D,        log p(y) = log N(z; 0, I) + log|det ∂z/∂y|,  z = flow(y),  D = C·H·W.

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
        self.flow = settings.build(self.shape)
        if settings.n_bits < 8:
            less = 8 - settings.n_bits
            self.words = replace(
                self.words,
                likelihood=f"of 8 bits; the images of {settings.n_bits} bits that are modelled need {less} less",
            )

    # -- training ------------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"flow": all parameters}."""
        return {"flow": list(self.parameters())}

    def phases(self) -> tuple[Phase, ...]:
        """A single phase, which trains the flow by its likelihood."""
        return (Phase(self.losses, moves=self.groups),)

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch x (B, C, H, W) in [0, 1].

        Args:
            generator: source of the noise u, on x's device; the global one if None.

        Returns:
            loss, bits_per_dim: both the bits per dimension of n-bit images; the loss is to be back-propagated.
        """
        self._check_batch("x", x)
        noise = noise_like(x, generator, torch.rand)
        bits = self._bits(self.flow.log_prob(self._dequantised(255 / 256 * x + 0.5 / 256, noise))).mean()
        return {"loss": bits, "bits_per_dim": bits.detach()}

    def _dequantised(self, x: Tensor, noise: Tensor) -> Tensor:
        """y of x in [0, 1), where level k of 8 bits lies between k/256 and (k + 1)/256."""
        levels = 2**self.settings.n_bits
        return ((x * levels).floor().clamp(0, levels - 1) + noise) / levels - 0.5

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
            return torch.cat([self.flow.log_prob(part - 0.5) for part in x.split(_BATCH)])

    def encode(self, x: Tensor) -> Tensor:
        """Noise z (B, C, H, W) of images x (B, C, H, W) in [0, 1], in eval mode: the noise of the middle of each level."""
        self._check_batch("x", x)
        middle = 255 / 256 * x + 0.5 / 256
        if self.settings.n_bits < 8:
            middle = self._dequantised(middle, torch.full_like(x, 0.5)) + 0.5
        with self.evaluating():
            return torch.cat([self.flow(part - 0.5)[0] for part in middle.split(_BATCH)])

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of noise z (B, C, H, W), in eval mode; the inverse of `encode`."""
        with self.evaluating():
            return self._pixels(torch.cat([self.flow.inverse(part)[0] for part in z.split(_BATCH)]))

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
        sizes = [min(_BATCH, n - start) for start in range(0, n, _BATCH) or [0]]
        with self.evaluating():
            made = [self.flow.sample(size, temperature=temperature, generator=generator) for size in sizes]
            return self._pixels(torch.cat(made))

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """Images (B, steps, C, H, W) of an arc through the noise, from each x0 to its x1 (B, C, H, W) in [0, 1]."""
        if steps < 2:
            raise ValueError(f"steps counts both ends, so steps must be ≥ 2; got {steps}")
        z = arc(self.encode(x0).flatten(1), self.encode(x1).flatten(1), steps)
        return self.decode(z.flatten(0, 1).unflatten(1, self.shape)).unflatten(0, (len(x0), steps))
