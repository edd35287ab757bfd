"""The scores of the battery by name: what each needs, how it is computed, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from glf_fast.data.color_mnist import PALETTE, color_of
from glf_fast.errors import UserError, did_you_mean
from glf_fast.metrics.collect import BLOCK
from glf_fast.metrics.critic import BATCH, STEPS, critic_distance
from glf_fast.metrics.density_coverage import density_coverage
from glf_fast.metrics.estimates import GROUPS, Estimate
from glf_fast.metrics.extractors import CLASSIFIERS, UNPUBLISHED, Extractor
from glf_fast.metrics.frechet import frechet_distance, jackknife_interval
from glf_fast.metrics.inception_score import inception_score
from glf_fast.metrics.kid import kid
from glf_fast.metrics.modes import mode_counts
from glf_fast.metrics.ms_ssim import PAIRS, WINDOW, diversity, scales
from glf_fast.metrics.nearest import Nearest, proximity
from glf_fast.metrics.prd import CLUSTERS, RUNS, prd
from glf_fast.metrics.precision_recall import NEIGHBOURS, precision_recall
from glf_fast.metrics.reference import KEEP
from glf_fast.metrics.stats import FeatureStats

__all__ = ["SCORES", "Estimates", "ImageSet", "Score", "check_scores", "named_scores"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A set of images as the scores see it.

    Attributes:
        stats: statistics with kept features, by the name of the extractor.
        images: the first images, uint8 (N, C, H, W), in the order of the kept features; None if only statistics are known.
        closest: the nearest training image of each of the first images, if it has been looked up.
    """

    stats: Mapping[str, FeatureStats]
    images: Tensor | None = None
    closest: Nearest | None = None

    def features(self, name: str) -> Tensor:
        """The kept features (N, dim) by an extractor."""
        return self.stats[name].kept

    @property
    def pixels(self) -> Tensor:
        """The images. Raises UserError if only statistics are known."""
        if self.images is None:
            raise UserError("saved statistics hold no images, which this score needs; give the images themselves")
        return self.images


Estimates = tuple[list[Estimate], dict[str, Any], str]
"""The estimates of a score, what the report shows beside them, and the protocol in words."""


@dataclass(frozen=True)
class Score:
    """A score of the battery.

    Attributes:
        needs: what of the images it needs: features of the first extractor, classes by each extractor that classifies, pixels
            alone, or features of all training images.
        numbers: name, direction and meaning of each number.
        estimate: the numbers of samples in comparison with held-out real images.
        anchor: real images in the place of the samples that show what a perfect model has: training images, or the held-out
            images themselves.
        noise: whether noise is an anchor, too.
    """

    needs: Literal["features", "classes", "images", "training"]
    numbers: tuple[tuple[str, str, str], ...]
    estimate: Callable[[ImageSet, ImageSet, Extractor, int], Estimates]
    anchor: Literal["train", "test"] = "train"
    noise: bool = False


def named_scores(text: str) -> tuple[str, ...]:
    """Names of scores in a list with commas, as commands have it; none in "". Raises UserError for a list that names none."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if text and not names:
        raise UserError(f"--scores {text!r} names no score; the scores are {', '.join(SCORES)}")
    return names


def check_scores(names: Sequence[str], extractors: Sequence[str]) -> str:
    """A message, if there is no score of a name, or no extractor that classifies for a score that needs one, else ""."""
    if wrong := [name for name in names if name not in SCORES]:
        return f"there is no score {wrong[0]!r}; {did_you_mean(wrong[0], SCORES)}the scores are {', '.join(SCORES)}"
    needing = [name for name in names if SCORES[name].needs == "classes"]
    if needing and not set(extractors) & set(CLASSIFIERS):
        known = [name for name in CLASSIFIERS if name not in UNPUBLISHED]
        return f"the score {needing[0]!r} needs an extractor that classifies: {', '.join(known)}"
    return ""


# -- the scores -----------------------------------------------------------------------------------------------------------


def _fd(samples: ImageSet, test: ImageSet, extractor: Extractor, seed: int) -> Estimates:
    a, b = samples.stats[extractor.name], test.stats[extractor.name]
    interval = jackknife_interval(a, b) if a.complete and a.n >= 2 * GROUPS else None
    return [Estimate(frechet_distance(a, b), interval)], {}, f"moments of {a.n} and {b.n} features"


def _kid(samples: ImageSet, test: ImageSet, extractor: Extractor, seed: int) -> Estimates:
    found = kid(samples.stats[extractor.name], test.stats[extractor.name])
    error = 1.96 * found.std / found.blocks**0.5
    return (
        [Estimate(found.mean, (found.mean - error, found.mean + error))],
        {},
        f"{found.blocks} blocks of {found.block} features of either set",
    )


def _pr(samples: ImageSet, test: ImageSet, extractor: Extractor, seed: int) -> Estimates:
    found = precision_recall(samples.stats[extractor.name], test.stats[extractor.name])
    protocol = f"balls to {NEIGHBOURS} nearest neighbours, {found.n} features of either set"
    return [Estimate(found.precision, None), Estimate(found.recall, None)], {}, protocol


def _is(samples: ImageSet, test: ImageSet, extractor: Extractor, seed: int) -> Estimates:
    logits = extractor.logits(samples.features(extractor.name)[:KEEP])
    return [inception_score(logits)], {}, f"{logits.shape[1]} classes, {len(logits)} images in one part"


def _prd(samples: ImageSet, test: ImageSet, extractor: Extractor, seed: int) -> Estimates:
    found = prd(samples.stats[extractor.name], test.stats[extractor.name], seed=seed)
    curve = torch.stack([found.recall, found.precision], 1)[::20].tolist()
    protocol = f"{RUNS} clusterings into {CLUSTERS} clusters, seed {seed}, {found.n} features of either set"
    return [found.f8, found.f1_8], {"curve": curve}, protocol


def _dc(samples: ImageSet, test: ImageSet, extractor: Extractor, seed: int) -> Estimates:
    found = density_coverage(samples.stats[extractor.name], test.stats[extractor.name])
    protocol = f"balls to {found.k} nearest neighbours of real features, {found.n} features of either set"
    return [found.density, found.coverage], {}, protocol


def _msssim(samples: ImageSet, test: ImageSet, extractor: Extractor, seed: int) -> Estimates:
    pairs = min(PAIRS, len(samples.pixels) // 2)
    count = scales(*samples.pixels.shape[2:])
    protocol = f"{pairs} pairs, {count} scale{'s' * (count > 1)}, window of {WINDOW} pixels"
    return [diversity(samples.pixels)], {}, protocol


def _critic(samples: ImageSet, test: ImageSet, extractor: Extractor, seed: int) -> Estimates:
    n = min(len(samples.pixels), len(test.pixels))
    found = critic_distance(samples.pixels[:n], test.pixels[:n], seed=seed, steps=STEPS)
    protocol = (
        f"{STEPS} steps of {BATCH} images on {(n + 1) // 2} images of either set, {n // 2} others scored, "
        f"pixels in [0, 1], seed {seed}"
    )
    return [found], {}, protocol


def _modes(samples: ImageSet, test: ImageSet, extractor: Extractor, seed: int) -> Estimates:
    in_colours = _in_colours(samples, extractor)
    if in_colours != _in_colours(test, extractor):
        raise UserError(
            f"the score 'modes' by {extractor.name} counts colours, so it cannot compare colour images with grey ones; give "
            "images of one kind"
        )
    colours = len(PALETTE) if in_colours else 1
    drawn, real = _modes_of(samples, extractor), _modes_of(test, extractor)
    found = mode_counts(drawn, real, extractor.classes * colours)
    kinds = f"{extractor.classes} classes" + (f" in {colours} colours" if colours > 1 else "")
    protocol = f"{found.modes} modes: {kinds}; {len(drawn)} samples, {len(real)} real images"
    return [found.hit, found.kl_uniform, found.kl_reference], {}, protocol


def _in_colours(images: ImageSet, extractor: Extractor) -> bool:
    return extractor.tells_colours and images.stats[extractor.name].source.get("image_shape", [1])[0] == 3


def _modes_of(images: ImageSet, extractor: Extractor) -> Tensor:
    """The mode (N,) of each image: its class, or, as the labels of ColorMNIST, 10 times its colour plus its digit."""
    if not _in_colours(images, extractor):
        return extractor.logits(images.features(extractor.name)[:KEEP]).argmax(1)
    grey = images.pixels.amax(1, keepdim=True)  # the digit, whatever its colour
    digits = torch.cat([extractor.logits(extractor(part)).argmax(1) for part in grey.split(BLOCK)])
    return extractor.classes * color_of(images.pixels).to(digits.device) + digits


def _nearest(samples: ImageSet, test: ImageSet, extractor: Extractor, seed: int) -> Estimates:
    if samples.closest is None or test.closest is None:
        raise UserError("the score 'nearest' needs all training images; give them, too (for `calc`, with --train)")
    found = proximity(samples.closest.squared.sqrt(), test.closest.squared.sqrt())
    protocol = f"{len(samples.closest.squared)} samples and {len(test.closest.squared)} test images looked up"
    return [found.closer, found.median], {}, protocol


SCORES: dict[str, Score] = {
    "fd": Score("features", (("FD", "lower", "Fréchet distance of the features"),), _fd),
    "kid": Score("features", (("KID", "lower", "kernel distance of the features, unbiased"),), _kid),
    "pr": Score(
        "features",
        (
            ("precision", "higher", "fraction of samples near real images"),
            ("recall", "higher", "fraction of real images near samples"),
        ),
        _pr,
    ),
    "is": Score("classes", (("IS", "higher", "clear classes, and all of them"),), _is),
    "prd": Score(
        "features",
        (
            ("F8", "higher", "recall of the distribution: nothing is missing"),
            ("F1/8", "higher", "precision of the distribution: nothing is wrong"),
        ),
        _prd,
    ),
    "dc": Score(
        "features",
        (
            ("density", "higher", "real neighbourhoods around a sample, 1 for real images"),
            ("coverage", "higher", "fraction of real neighbourhoods with a sample"),
        ),
        _dc,
    ),
    "msssim": Score("images", (("1 − MS-SSIM", "as real", "how different samples are from each other"),), _msssim),
    "critic": Score(
        "images", (("critic", "lower", "Wasserstein distance by an independent critic"),), _critic, noise=True
    ),
    "modes": Score(
        "classes",
        (
            ("modes hit", "higher", "classes that samples have"),
            ("KL to uniform", "as real", "divergence of the classes from equal shares"),
            ("KL to real", "lower", "divergence of the classes from those of real images"),
        ),
        _modes,
    ),
    "nearest": Score(
        "training",
        (
            (
                "closer than test",
                "0.5",
                "probability that a sample is closer to a training image than a test image; 1: copies",
            ),
            (
                "distance / test",
                "1",
                "median distance to the nearest training image, over that of test images; 0: copies",
            ),
        ),
        _nearest,
        anchor="test",
    ),
}
