"""Pictures of a model: samples from fixed noise, and reconstructions and interpolations of test images if it can make them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from glf_fast import distributed, seeds
from glf_fast.data import ImageDataset
from glf_fast.errors import UserError
from glf_fast.files import atomic_write
from glf_fast.images import grid, save_png, to_float, to_uint8
from glf_fast.metrics import subset
from glf_fast.models import Decodes, GenerativeModel, Interpolates, Reconstructs

__all__ = [
    "check_count",
    "draw",
    "draw_pictures",
    "draw_towards",
    "latest_picture",
    "picture_name",
    "save_picture",
    "saved_pictures",
]

# Noise is always drawn for this many images at a time, so that image i does not depend on n. A sampling mode with batch
# statistics computes them from these images.
_CHUNK = 500


def check_count(n: int) -> None:
    """Raise UserError unless n images can be drawn."""
    if n < 1:
        raise UserError(f"n = {n} images cannot be drawn; n must be 1 or more")


def draw(
    model: GenerativeModel, n: int, *, seed: int, temperature: float = 1.0, mode: str = "", divided: bool = False
) -> Tensor:
    """n images as uint8 (n, C, H, W) on the model's device; image i depends on (seed, i) alone, not on n.

    Pixels that are not finite become black, and a line on stderr says so; a flow may overflow early in training.

    Args:
        divided: draw only those of the n images that are this process's part (`distributed`), which may be none; all
            processes must call this function.

    Raises:
        UserError: n < 1, a negative temperature, a sampling mode that the model does not have, or a model of other data than
            images.
    """
    check_count(n)
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature = {temperature} must be 0 or more")
    model.check_mode(mode)
    if len(model.shape) != 3:
        raise UserError(
            f"images cannot be drawn: this {model.words.title} was trained on data of shape {model.shape}, not on images"
        )
    device = next(model.parameters()).device
    own = distributed.parts(n, _CHUNK)[distributed.rank()] if divided else range(n)
    try:
        # All at once, so that it fails now where there is no memory.
        images = torch.empty((len(own), *model.shape), dtype=torch.uint8, device=device)
    except (RuntimeError, TypeError) as error:  # of sizes beyond 64 bits torch says that they overflow
        raise MemoryError(f"{n} images") from error
    broken = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(own), _CHUNK):
        generator = seeds.generator(seed, "sample", (own.start + start) // _CHUNK, device=device)
        x = model.sample(_CHUNK, temperature=temperature, generator=generator, mode=mode)[: len(own) - start]
        broken += (~x.isfinite().flatten(1).all(1)).sum()
        images[start : start + _CHUNK] = to_uint8(x.nan_to_num(0.0, 0.0, 0.0))
    count = distributed.total(int(broken)) if divided else int(broken)
    if count:
        print(f"{count} of {n} samples are not finite and have black pixels", file=sys.stderr)
    return images


def draw_towards(
    model: GenerativeModel, train: ImageDataset, test: ImageDataset, labels: tuple[int, int], n: int
) -> Tensor:
    """Rows of uint8 images (n, 9, C, H, W): test images of one label, whose codes move in the direction of another label.

    The direction is the difference of the mean codes of up to 1,000 training images of each label
    (arXiv:1807.03039, section 6.1). The first image of a row is the test image as the model decodes its own code, and the last
    one has the whole difference added.

    Raises:
        UserError: n < 1, a model that does not encode and decode, data without labels, or a label that no image has.
    """
    check_count(n)
    if not isinstance(model, Decodes):
        raise UserError(f"{model.words.title} does not encode and decode images, so --towards cannot be used")
    device = next(model.parameters()).device

    def images(dataset: ImageDataset, label: int, most: int) -> Tensor:
        if dataset.labels is None:
            raise UserError(f"{dataset.name} has no labels, which --towards needs")
        found = dataset.images[dataset.labels == label][:most]
        if not len(found):
            known = ", ".join(map(str, dataset.labels.unique().tolist()[:20]))
            raise UserError(f"{dataset.name} has no {dataset.split} images with label {label}; its labels are {known}")
        return to_float(found.to(device))

    with model.evaluating():
        start, end = (model.encode(images(train, label, 1000)).mean(0) for label in labels)
        z = model.encode(images(test, labels[0], n))
        steps = torch.linspace(0, 1, 9, device=device, dtype=z.dtype).view(-1, *(1,) * (z.ndim - 1))
        moved = z[:, None] + steps * (end - start)
        return to_uint8(torch.stack([model.decode(row) for row in moved]).nan_to_num())


def draw_pictures(model: GenerativeModel, test_images: Tensor, seed: int) -> dict[str, Tensor]:
    """A uint8 picture (C, H, W) of each kind that the model can make; the noise and the test images used are always the same.

    The test images (N, C, H, W) are put into a fixed random order, because data sets may be sorted by class. Reconstructions
    are
    pairs of rows: real images, and below them their reconstructions. Interpolations run from one test image to another.
    """
    pictures = {"samples": grid(draw(model, 64, seed=seed))}
    real = subset(test_images, min(32, len(test_images) // 2 * 2))
    if isinstance(model, Reconstructs):
        half = len(real) // 2
        rebuilt = to_uint8(model.reconstruct(to_float(real)))
        pairs = torch.cat([real[:half], rebuilt[:half], real[half:], rebuilt[half:]])
        pictures["reconstructions"] = grid(pairs, columns=half)
    if isinstance(model, Interpolates):
        ends = to_float(real[:10])
        ways = to_uint8(model.interpolate(ends[0::2], ends[1::2], 12).nan_to_num())
        pictures["interpolations"] = grid(ways.flatten(0, 1), columns=12)
    return {kind: picture.cpu() for kind, picture in pictures.items()}


def picture_name(images: int) -> str:
    """File name of the pictures drawn after `images` training images."""
    return f"{images:09d}.png"


def save_picture(run: Path, kind: str, picture: Tensor | str, images: int) -> None:
    """Write run/{kind}/{images seen}.png, enlarged if it is small; a text as .txt."""
    if isinstance(picture, str):
        path = (run / kind / picture_name(images)).with_suffix(".txt")
        with atomic_write(path) as temporary:
            temporary.write_text(picture + "\n", encoding="utf-8")
        return
    save_png(run / kind / picture_name(images), picture, scale=math.ceil(480 / picture.shape[-1]))


def latest_picture(run: Path, kind: str) -> Path | None:
    """The newest picture of a kind, or None."""
    return max(saved_pictures(run, kind), default=None)


def saved_pictures(run: Path, kind: str) -> list[Path]:
    """The pictures of a kind, oldest first."""
    found = (path for path in (run / kind).glob("*") if path.suffix in (".png", ".txt"))
    return sorted(path for path in found if path.stem.isdecimal())  # not one that is being written
