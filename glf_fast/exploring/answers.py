"""The answers of an opened run: pictures and lines of text, computed from plain arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from glf_fast import seeds
from glf_fast.data import ImageDataset
from glf_fast.errors import UserError
from glf_fast.exploring.codes import Codes
from glf_fast.exploring.loading import Opened
from glf_fast.exploring.neighbours import USUAL
from glf_fast.images import to_float, to_uint8
from glf_fast.metrics import subset
from glf_fast.models import Decodes, HasLikelihood, Interpolates, Reconstructs, ScoresCodes
from glf_fast.training.scoring import bits_per_dim

__all__ = ["Answer", "edit", "interpolate", "nearest", "plane", "prepare", "reconstruct", "sample", "walk"]

_NEAREST = 7
_COLUMNS = 4  # of the sample and its neighbours
_STEPS = 9
# Test images with which a likelihood is compared.
_COMPARED = 100
# The map of a plane has so many images along each side.
MAP = 7


@dataclass(frozen=True)
class Answer:
    """Images uint8 (N, C, H, W) in rows of `columns`, and lines of text about them."""

    images: Tensor
    columns: int
    lines: tuple[str, ...] = ()


def prepare(opened: Opened) -> None:
    """Compute what later answers share: principal components, and the search among the training images."""
    if opened.codes is not None:
        _ = opened.codes.mean
    _usual(opened)


@lru_cache(maxsize=8)
def sample(opened: Opened, count: int, temperature: float, seed: int) -> Answer:
    """`count` samples; the same noise at every temperature."""
    generator = seeds.generator(seed, "explore", device=opened.device)
    x = opened.model.sample(count, temperature=temperature, generator=generator)
    broken = int((~x.isfinite().flatten(1).all(1)).sum())
    lines = (f"{broken} of {count} samples are not finite and have black pixels",) if broken else ()
    return Answer(_pixels(x), math.ceil(math.sqrt(count)), lines)


def nearest(opened: Opened, image: Tensor) -> Answer:
    """An image uint8 (C, H, W), and the training images that are nearest to it in pixels, nearest first."""
    found = opened.neighbours.nearest(image, _NEAREST)
    levels = ", ".join(f"{distance:.1f}" for distance in found.distances.tolist())
    lines = (
        "the sample, then its nearest training images by pixels",
        f"distances (root mean square, white is 255): {levels}",
        f"test images are {_usual(opened):.1f} from their nearest one (median of {min(USUAL, len(opened.test))})",
    )
    return Answer(torch.cat([image[None], opened.train.images[found.places]]), _COLUMNS, lines)


@cache
def _usual(opened: Opened) -> float:
    return opened.neighbours.usual(opened.test.images)


def walk(opened: Opened, origin: Tensor, axes: tuple[str, str], at: tuple[float, float]) -> Answer:
    """The image at a place of the plane through a code (…) that two directions span."""
    return Answer(_codes(opened).moved(origin, [_sum(axes, at)]), 1)


def plane(opened: Opened, origin: Tensor, axes: tuple[str, str], extent: float) -> Answer:
    """7 × 7 images of this plane, from -extent to extent: the first direction to the right, the second one upwards."""
    ticks = torch.linspace(-extent, extent, MAP).tolist()
    places = [_sum(axes, (right, up)) for up in reversed(ticks) for right in ticks]
    return Answer(_codes(opened).moved(origin, places), MAP)


def _sum(axes: tuple[str, str], at: tuple[float, float]) -> Mapping[str, float]:
    return {axes[0]: sum(at)} if axes[0] == axes[1] else dict(zip(axes, at, strict=True))


def interpolate(opened: Opened, start: Tensor, end: Tensor) -> Answer:
    """9 images from one image to another, uint8 (C, H, W), as the model decodes them."""
    model = opened.model
    if not isinstance(model, Interpolates):
        raise UserError(f"{model.words.title} does not interpolate between images")
    x0, x1 = (to_float(image[None].to(opened.device)) for image in (start, end))
    return Answer(_pixels(model.interpolate(x0, x1, _STEPS)[0]), _STEPS)


def edit(opened: Opened, image: Tensor, amounts: Mapping[str, float]) -> Answer:
    """An image uint8 (C, H, W), the model's image of its code, and that of its code moved by attributes."""
    codes = _codes(opened)
    known = {name: amount for name, amount in amounts.items() if name in codes.attributes}
    moved = codes.moved(codes.encode(image[None])[0], [{}, known])
    lines: tuple[str, ...] = ("the image, as the model decodes its code, and edited",)
    if missing := sorted(set(amounts) - set(known)):
        lines += (f"this run has no {', '.join(missing)}",)
    return Answer(torch.cat([image[None], moved]), 3, lines)


def reconstruct(opened: Opened, image: Tensor) -> Answer:
    """An image uint8 (C, H, W), its reconstruction and their difference, as far as the model has them; and its likelihood."""
    model, x = opened.model, to_float(image[None].to(opened.device))
    images, lines = [image[None]], []
    rebuilt = None
    if isinstance(model, Reconstructs):
        rebuilt = _pixels(model.reconstruct(x))
    elif isinstance(model, Decodes):
        with model.evaluating():
            rebuilt = _pixels(model.decode(model.encode(x)))
    if rebuilt is not None:
        difference = (rebuilt.int() - image.int()).abs()
        images += [rebuilt, 255 - difference.to(torch.uint8)]
        error = difference.float().square().mean().item()
        psnr = f"{10 * math.log10(255**2 / error):.1f} dB" if error else "no difference"
        lines += ["the image, its reconstruction, and their difference", f"peak signal-to-noise ratio: {psnr}"]
    lines += likelihood(opened, image)
    return Answer(torch.cat(images), len(images), tuple(lines))


def likelihood(opened: Opened, image: Tensor) -> list[str]:
    """Lines about the likelihood of an image uint8 (C, H, W), in comparison with 100 test images; none for a model without."""
    model = opened.model
    if isinstance(model, HasLikelihood):
        one = ImageDataset("upload", "test", image[None], None, "")
        bits, others = bits_per_dim(model, one, 1)[0], _test_bits(opened)
        if not bits.isfinite():
            return [f"the likelihood ({model.words.likelihood}) is not finite"]
        return [
            f"{bits:.3f} bits per dimension ({model.words.likelihood}); fewer are more likely",
            f"of {len(others)} test images, {int((others > bits).sum())} need more",
        ]
    if isinstance(model, ScoresCodes):
        [density], others = model.code_log_prob(_codes(opened).encode(image[None])), _test_densities(opened)
        if not density.isfinite():
            return ["the log-density of the code is not finite"]
        return [
            f"log-density of the code: {density:.1f} nats",
            f"of {len(others)} test images, {int((others < density).sum())} have a less likely code",
        ]
    return []


@cache
def _test_bits(opened: Opened) -> Tensor:
    assert isinstance(opened.model, HasLikelihood)
    return bits_per_dim(opened.model, opened.test, _COMPARED)


@cache
def _test_densities(opened: Opened) -> Tensor:
    assert isinstance(opened.model, ScoresCodes)
    return opened.model.code_log_prob(_codes(opened).encode(subset(opened.test.images, _COMPARED)))


def _codes(opened: Opened) -> Codes:
    if opened.codes is None:
        raise UserError(f"{opened.model.words.title} has no codes")
    return opened.codes


def _pixels(x: Tensor) -> Tensor:
    """Images of a model as uint8 on the CPU; pixels that are not finite become black."""
    return to_uint8(x.nan_to_num(0.0, 0.0, 0.0)).cpu()
