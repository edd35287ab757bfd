"""Nearest training images: whether samples are copies of what the model was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from glf_fast.errors import UserError
from glf_fast.metrics.estimates import GROUPS, Estimate, TooFew, jackknife
from glf_fast.metrics.neighbours import CHUNK, squared_distances

__all__ = ["LOOKED_UP", "Nearest", "Proximity", "nearest", "proximity"]

# Number of samples, and of test images, whose nearest training image is looked for.
LOOKED_UP = 2000


class Nearest(NamedTuple):
    """The squared distance (n,) of each feature to its nearest training feature, and the number (n,) of that feature."""

    squared: Tensor
    number: Tensor


class Proximity(NamedTuple):
    """How close samples are to training images, in comparison with test images.

    Attributes:
        closer: probability that a sample is closer to its nearest training image than a test image; 0.5 where the samples are
            as far away as test images, 1 for copies.
        median: median distance of a sample from its nearest training image, in units of that of a test image.
    """

    closer: Estimate
    median: Estimate


def nearest(features: Tensor, training: Iterable[Tensor]) -> Nearest:
    """The nearest of the training features, which come as batches (m, d), to each of the features (n, d).

    Of equally near features the first one is taken. Costs O(n·m·d) for each batch, and n·m numbers of memory.
    """
    squared = torch.full((len(features),), torch.inf, dtype=torch.float64, device=features.device)
    index = torch.full((len(features),), -1, device=features.device)
    x, start = features.double(), 0
    for batch in training:
        for part in batch.split(CHUNK):
            found, place = squared_distances(x, part.to(x.device).double()).clamp(min=0).min(1)
            closer = found < squared
            squared, index = torch.where(closer, found, squared), torch.where(closer, start + place, index)
            start += len(part)
    if not bool(squared.isfinite().all()) and start:
        raise UserError("features contain NaN or infinity; check the images and the extractor's weights")
    return Nearest(squared, index)


def proximity(samples: Tensor, test: Tensor) -> Proximity:
    """Distances d (n,) of samples, and d' (m,) of test images, from their nearest training images, compared.

    `closer` is P(d < d') + P(d = d')/2, the statistic of Mann and Whitney by which Meehan, Chaudhuri & Dasgupta
    (arXiv:2004.05675, section 3.1) test for data copying.

    Raises:
        TooFew: no samples or no test images.
    """
    if not (len(samples) and len(test)):
        raise TooFew("a comparison with test images needs at least one image on either side")
    test = test.to(samples.device).sort().values
    below = torch.searchsorted(test, samples, right=False)
    upto = torch.searchsorted(test, samples, right=True)
    wins = 1 - (below + upto).double() / (2 * len(test))  # the fraction of test images that are farther away
    middle = float(test.median())

    def ratio(distances: Tensor) -> float:
        return float(distances.median()) / middle if middle > 0 else float("nan")

    closer, median = float(wins.mean()), ratio(samples)
    if len(samples) < 2 * GROUPS:
        return Proximity(Estimate(closer, None), Estimate(median, None))
    groups = torch.arange(len(samples), device=samples.device) % GROUPS
    rest = [groups != group for group in range(GROUPS)]
    return Proximity(
        jackknife(closer, torch.stack([wins[others].mean() for others in rest]), 0, 1),
        jackknife(median, torch.tensor([ratio(samples[others]) for others in rest]), 0),
    )
