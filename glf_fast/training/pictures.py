"""Pictures of a model: samples from fixed noise, and reconstructions and interpolations of test images if it can make them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from glf_fast import distributed, seeds
from glf_fast.data import ImageDataset
from glf_fast.errors import UserError
from glf_fast.files import atomic_write
from glf_fast.images import grid, save_png, to_float, to_uint8
from glf_fast.metrics import subset
from glf_fast.models import Decodes, GenerativeModel, Interpolates, Reconstructs, SamplesClasses

__all__ = [
    "check_count",
    "draw",
    "draw_attribute",
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
    model: GenerativeModel,
    n: int,
    *,
    seed: int,
    temperature: float = 1.0,
    mode: str = "",
    label: int | None = None,
    divided: bool = False,
) -> Tensor:
    """n images as uint8 (n, C, H, W) on the model's device; image i depends on (seed, i) alone, not on n.

    Pixels that are not finite become black, and a line on stderr says so; a flow may overflow early in training.

    Args:
        label: class to sample from, for a model with classes; by default images are of all classes.
        divided: draw only those of the n images that are this process's part (`distributed`), which may be none; all
            processes must call this function.

    Raises:
        UserError: n < 1, a negative temperature, a sampling mode or a class that the model does not have, or a model of other
            data than images.
    """
    check_count(n)
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature = {temperature} must be 0 or more")
    model.check_mode(mode)
    if label is not None:
        _check_label(model, label)
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
        if label is None:
            x = model.sample(_CHUNK, temperature=temperature, generator=generator, mode=mode)
        else:
            x = _of_class(model, label, _CHUNK, temperature=temperature, generator=generator)
        x = x[: len(own) - start]
        broken += (~x.isfinite().flatten(1).all(1)).sum()
        images[start : start + _CHUNK] = to_uint8(x.nan_to_num(0.0, 0.0, 0.0))
    count = distributed.total(int(broken)) if divided else int(broken)
    if count:
        print(f"{count} of {n} samples are not finite and have black pixels", file=sys.stderr)
    return images


def _classes(model: GenerativeModel) -> tuple[int, ...]:
    """Labels of the model's classes; () for a model without."""
    return model.classes if isinstance(model, SamplesClasses) else ()


def _check_label(model: GenerativeModel, label: int) -> None:
    """Raise UserError unless the model has a class of this label."""
    classes = _classes(model)
    if not classes:
        raise UserError(
            f"this {model.words.title} has no classes, so --label cannot be used; train one with --model.conditional"
        )
    if label not in classes:
        raise UserError(f"this {model.words.title} has no class {label}; its labels are {_listed(classes)}")


def _listed(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels[:20])) + ", …" * (len(labels) > 20)


def _of_class(
    model: GenerativeModel, label: int, n: int, *, temperature: float = 1.0, generator: torch.Generator
) -> Tensor:
    """n samples of the class with this label."""
    assert isinstance(model, SamplesClasses)
    labels = torch.full((n,), label, device=generator.device)
    return model.sample_classes(labels, temperature=temperature, generator=generator)


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

    def images(dataset: ImageDataset, label: int) -> Tensor:
        if dataset.labels is None:
            raise UserError(f"{dataset.name} has no labels, which --towards needs")
        found = dataset.images[dataset.labels == label]
        if not len(found):
            known = _listed(dataset.labels.unique().tolist())
            raise UserError(f"{dataset.name} has no {dataset.split} images with label {label}; its labels are {known}")
        return found

    pair = images(train, labels[0]), images(train, labels[1])
    return _moved(model, "--towards", pair, images(test, labels[0]), n, torch.linspace(0, 1, 9))


def draw_attribute(model: GenerativeModel, train: ImageDataset, test: ImageDataset, has: Tensor, n: int) -> Tensor:
    """Rows of uint8 images (n, 9, C, H, W): random test images, whose codes move along the direction of an attribute.

    The direction is that of `draw_towards`, from training images without the attribute to those with it. The middle image of
    a row is the test image as the model decodes its own code; to the left there is less of the attribute, to the right more.

    Args:
        has: whether each training image has the attribute, bool (N,).

    Raises:
        UserError: n < 1, a model that does not encode and decode, or an attribute that all training images have, or none.
    """
    pair = train.images[~has], train.images[has]
    if not (len(pair[0]) and len(pair[1])):
        many = "all" if len(pair[1]) else "none"
        raise UserError(f"{many} of the training images have this attribute, so it has no direction; choose another")
    return _moved(model, "--attribute", pair, subset(test.images, n), n, torch.linspace(-1, 1, 9))


def _moved(
    model: GenerativeModel, option: str, pair: tuple[Tensor, Tensor], images: Tensor, n: int, steps: Tensor
) -> Tensor:
    """Rows of the first n images, whose codes move by `steps` times the difference of the mean codes of a pair of sets."""
    check_count(n)
    if not isinstance(model, Decodes):
        raise UserError(f"{model.words.title} does not encode and decode images, so {option} cannot be used")
    device = next(model.parameters()).device
    with model.evaluating():
        start, end = (model.encode(to_float(part[:1000].to(device))).mean(0) for part in pair)
        z = model.encode(to_float(images[:n].to(device)))
        moved = z[:, None] + steps.to(z).view(-1, *(1,) * (z.ndim - 1)) * (end - start)
        return to_uint8(torch.stack([model.decode(row) for row in moved]).nan_to_num())


def draw_pictures(model: GenerativeModel, test_images: Tensor, seed: int) -> dict[str, Tensor]:
    """A uint8 picture (C, H, W) of each kind that the model can make; the noise and the test images used are always the same.

    The test images (N, C, H, W) are put into a fixed random order, because data sets may be sorted by class. Classes are rows
    of samples of up to 20 classes, all from the same noise. Reconstructions are pairs of rows: real images, and below them
    their reconstructions. Interpolations run from one test image to another.
    """
    pictures = {"samples": grid(draw(model, 64, seed=seed))}
    if classes := _classes(model)[:20]:
        device = next(model.parameters()).device
        rows = [
            _of_class(model, label, 8, generator=seeds.generator(seed, "sample", 0, device=device)) for label in classes
        ]
        pictures["classes"] = grid(to_uint8(torch.cat(rows).nan_to_num(0.0, 0.0, 0.0)), columns=8)
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
