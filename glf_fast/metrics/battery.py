"""The battery: several scores of samples, and beside each the same score of real images in the samples' place."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from glf_fast import distributed, seeds
from glf_fast.distributed import by_main
from glf_fast.images import grid
from glf_fast.metrics.collect import BLOCK
from glf_fast.metrics.estimates import Estimate, TooFew
from glf_fast.metrics.extractors import Extractor
from glf_fast.metrics.nearest import LOOKED_UP, Nearest, nearest
from glf_fast.metrics.reference import all_features
from glf_fast.metrics.score_table import SCORES, ImageSet

__all__ = ["KEPT_IMAGES", "battery", "shown", "shown_interval", "table"]

# Images of a set that the scores of images use: the first ones.
KEPT_IMAGES = 10_000
_PAIRS = 10  # in the picture of nearest training images
_COLUMNS = {"real": "real images", "noise": "noise"}


def battery(
    scores: Sequence[str],
    extractors: Sequence[Extractor],
    samples: ImageSet,
    test: ImageSet,
    train: ImageSet | None = None,
    training: Tensor | None = None,
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The scores of `SCORES`, number by number, JSON-ready.

    Of several processes all must call this with the same sets; process 0 computes the scores, and all of them look for
    nearest training images.

    Args:
        extractors: the first one is that of scores of features; each that classifies is that of scores of classes.
        train: as many real training images as there are samples, for the anchors.
        training: all training images, uint8, for `nearest`.

    Returns:
        For each number {"score", "name", "value", "interval", "real": its value for real images, "noise": for noise, "better":
        "higher", "lower", "as real" or the value itself, "meaning", "protocol", "note"}. A value is None where there are too
        few images of its kind, which the note says. Beside them "curve" (PRD), and "picture" (samples above their nearest
        training images, a PNG in base64).

    Raises:
        UserError: a score needs what is not known, or images of one shape.
    """
    first = extractors[0]
    if "nearest" in scores and training is not None:
        samples, test = _looked_up(samples, test, training, first)
    return by_main(_battery)(scores, extractors, samples, test, train, training, seed)


def _battery(
    scores: Sequence[str],
    extractors: Sequence[Extractor],
    samples: ImageSet,
    test: ImageSet,
    train: ImageSet | None,
    training: Tensor | None,
    seed: int,
) -> list[dict[str, Any]]:
    found = []
    for name in (name for name in SCORES if name in scores):
        score = SCORES[name]
        used = [e for e in dict.fromkeys(extractors) if e.classes] if score.needs == "classes" else extractors[:1]
        for extractor in used:
            numbers = _numbers(name, extractor, samples, test, test if score.anchor == "test" else train, seed)
            if (
                name == "nearest"
                and samples.images is not None
                and samples.closest is not None
                and training is not None
            ):
                numbers[0]["picture"] = _picture(samples.images, samples.closest, training)
            found += numbers
        if not used:
            found += [_number(name, i, "", None, note="no extractor classifies") for i in range(len(score.numbers))]
    return found


def _numbers(
    name: str, extractor: Extractor, samples: ImageSet, test: ImageSet, anchor: ImageSet | None, seed: int
) -> list[dict[str, Any]]:
    score = SCORES[name]
    try:
        estimates, extras, protocol = score.estimate(samples, test, extractor, seed)
    except TooFew as error:
        return [_number(name, i, extractor.name, None, note=str(error)) for i in range(len(score.numbers))]
    numbers = [_number(name, i, extractor.name, estimate, protocol) for i, estimate in enumerate(estimates)]
    if anchor is not None and anchor.images is not None and score.needs == "images":
        anchor = replace(
            anchor, images=anchor.images[: len(samples.pixels)]
        )  # as many as have given the value, or fewer
    noise = _noise(test.pixels[: len(samples.pixels)], seed) if score.noise else None
    anchors = {"real": anchor, "noise": noise}
    for kind, images in anchors.items():
        if images is None:
            continue
        try:
            found, _, of_anchor = score.estimate(images, test, extractor, seed)
        except TooFew as error:
            for number in numbers:
                number["note"] = f"no value of {_COLUMNS[kind]}, because {error}"
            continue
        for number, estimate in zip(numbers, found, strict=True):
            number[kind] = _finite(estimate.value)
            if of_anchor != protocol:
                number["protocol"] += f"; {_COLUMNS[kind]}: {of_anchor}"
    numbers[0] |= extras
    return numbers


def _number(
    name: str, i: int, extractor: str, estimate: Estimate | None, protocol: str = "", note: str = ""
) -> dict[str, Any]:
    score = SCORES[name]
    title, better, meaning = score.numbers[i]
    of_images = score.needs == "images" or not extractor
    value = None if estimate is None else _finite(estimate.value)
    return {
        "score": name,
        "name": title if of_images else f"{title}[{extractor}]",
        "value": value,
        "interval": list(estimate.interval) if estimate and estimate.interval and value is not None else None,
        "real": None,
        "noise": None,
        "better": better,
        "meaning": meaning,
        "protocol": protocol,
        "note": note,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _noise(images: Tensor, seed: int) -> ImageSet:
    """Images of uniform noise, equally many and of the same shape."""
    random = seeds.generator(seed, "noise images")
    return ImageSet({}, torch.randint(0, 256, images.shape, generator=random, dtype=torch.uint8).to(images.device))


# -- nearest training images ------------------------------------------------------------------------------------------------


def _looked_up(samples: ImageSet, test: ImageSet, training: Tensor, extractor: Extractor) -> tuple[ImageSet, ImageSet]:
    """Both sets with their nearest training images, of which each process takes its part."""
    parts = [images.features(extractor.name)[:LOOKED_UP] for images in (samples, test)]
    own = distributed.parts(len(training), BLOCK)[distributed.rank()]
    features = all_features(training, extractor)[own.start : own.stop]
    found = nearest(torch.cat([parts[0], parts[1].to(parts[0].device)]), features.split(BLOCK) if own else ())
    ones = [1] * distributed.size()
    squared = distributed.joined(found.squared[None], ones)
    index = distributed.joined(found.number[None] + own.start, ones)
    closest = squared.argmin(0, keepdim=True)
    squared, index = squared.gather(0, closest)[0], index.gather(0, closest)[0]
    n = len(parts[0])
    return (
        replace(samples, closest=Nearest(squared[:n], index[:n])),
        replace(test, closest=Nearest(squared[n:], index[n:])),
    )


def _picture(images: Tensor, found: Nearest, training: Tensor) -> str:
    """The samples that are closest to training images, above these, as PNG in base64."""
    chosen = found.squared.argsort(stable=True)[:_PAIRS].cpu()
    pairs = [images.cpu()[chosen], training.cpu()[found.number.cpu()[chosen]]]
    channels = max(x.shape[1] for x in pairs)
    rows = (
        torch.cat([x.expand(-1, channels, -1, -1) for x in pairs])
        if pairs[0].shape[2:] == pairs[1].shape[2:]
        else pairs[0]
    )
    pixels = grid(rows, columns=len(chosen)).expand(3, -1, -1).permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


# -- text -----------------------------------------------------------------------------------------------------------------


def table(numbers: Sequence[Mapping[str, Any]]) -> str:
    """Numbers of `battery` as a table of text, one line each, and below it the notes."""
    with_noise = any(number["noise"] is not None for number in numbers)
    rows = [("score", "value", "95 %", "real images", *(["noise"] if with_noise else []), "better", "meaning")]
    for number in numbers:
        noise = [shown(number["noise"])] if with_noise else []
        values = shown(number["value"]), shown_interval(number), shown(number["real"]), *noise
        rows.append((number["name"], *values, number["better"], number["meaning"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = len(rows[0]) - 2
    lines = [
        "  ".join(
            cell.rjust(width) if 0 < i < numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    notes = dict.fromkeys(f"{number['score']}: {number['note']}" for number in numbers if number["note"])
    return "\n".join([*lines, *notes])


def shown(value: float | None) -> str:
    """A number as text, with three significant digits or more; "" for None."""
    if value is None:
        return ""
    if 0 < abs(value) < 0.1:
        return f"{value:#.3g}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def shown_interval(number: Mapping[str, Any]) -> str:
    """The interval of a number as text."""
    return " … ".join(map(shown, number["interval"])) if number["interval"] else ""
