"""The nearest training images of an image, in pixels: exact, but without looking at all pixels of all images."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from glf_fast.metrics import subset

__all__ = ["Found", "Neighbours"]

# Images are compared by the means of so many blocks along each side first.
_BLOCKS = 7
_BATCH = 4096


class Found(NamedTuple):
    """The nearest images of one image: their places (k,) in the training set, and root mean square differences in levels (k,)."""

    places: Tensor
    distances: Tensor


class Neighbours:
    """Search among training images uint8 (N, C, H, W).

    The squared distance of two images is at least that of the means of their blocks of b pixels, times b. So candidates come in
    the order of this bound, which costs 49 numbers an image and channel, and the search ends when no bound is below the k-th
    distance found. The means are computed at the first search.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self._side = tuple(max(1, side // _BLOCKS) for side in images.shape[2:])

    def _means(self, images: Tensor) -> Tensor:
        """Means of the blocks (N, …), so scaled that their squared distance is the bound."""
        height, width = self._side
        return avg_pool2d(images.float(), self._side).flatten(1) * (height * width) ** 0.5

    @cached_property
    def _of_training(self) -> Tensor:
        return torch.cat([self._means(part) for part in self.images.split(_BATCH)])

    def nearest(self, image: Tensor, k: int) -> Found:
        """The k training images nearest to a uint8 image (C, H, W), nearest first; fewer if there are fewer."""
        k = min(k, len(self.images))
        # Rounding must not raise a bound above its distance.
        bounds = (self._of_training - self._means(image[None])).square().sum(1) * (1 - 1e-4) - 1e-2
        order = bounds.argsort()
        x = image.flatten().float()
        places, squared = order[:0], bounds[:0]
        start, size = 0, max(64, 4 * k)
        while start < len(order):
            part = order[start : start + size]
            if len(squared) == k and bounds[part[0]] > squared[-1]:
                break
            found = (self.images[part].flatten(1).float() - x).square().sum(1)
            squared, best = torch.cat([squared, found]).topk(k, largest=False)
            places = torch.cat([places, part])[best]
            start, size = start + size, 2 * size
        return Found(places, (squared / image.numel()).sqrt())

    def usual(self, images: Tensor, n: int = 20) -> float:
        """Median distance, in levels, of up to n images uint8 (N, C, H, W) of a test set from their nearest training images."""
        return float(torch.stack([self.nearest(image, 1).distances[0] for image in subset(images, n)]).median())
