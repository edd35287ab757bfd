"""The nearest training images of an image, in pixels: exact, but without looking at all pixels of all images."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from glf_fast.metrics import subset

__all__ = ["USUAL", "Found", "Neighbours"]

# Images are compared by the means of so many blocks along each side first.
_BLOCKS = 9
_BATCH = 4096
# Test images whose usual distance is told.
USUAL = 20


class Found(NamedTuple):
    """The nearest images of an image: places (k,) in the training set, and root mean square differences (k,) in levels."""

    places: Tensor
    distances: Tensor


class Neighbours:
    """Search among training images uint8 (N, C, H, W).

    An image is divided into the part that is constant on blocks of pixels, and the rest. The squared distance of two images is
    that of the first parts, which the means of the blocks give, plus that of the rests, which is at least the squared
    difference of their lengths. So candidates come in the order of this bound, which costs some 80 numbers a channel,
    and the search ends when no bound is below the k-th distance found.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self._side = tuple(max(1, side // _BLOCKS) for side in images.shape[2:])

    def _keys(self, images: Tensor) -> Tensor:
        """Numbers (N, …) of images, whose squared distance is the bound."""
        x, (height, width) = images.float(), self._side
        means = avg_pool2d(x, self._side).flatten(1) * (height * width) ** 0.5
        rest = x.flatten(1).square().sum(1) - means.square().sum(1)
        return torch.cat([means, rest.clamp(min=0).sqrt()[:, None]], 1)

    @cached_property
    def _of_training(self) -> Tensor:
        """The keys of the training images, computed at the first search."""
        return torch.cat([self._keys(part) for part in self.images.split(_BATCH)])

    def nearest(self, image: Tensor, k: int) -> Found:
        """The k training images nearest to a uint8 image (C, H, W), nearest first; fewer if there are fewer."""
        k = min(k, len(self.images))
        keys = self._keys(image[None])
        # Rounding must not raise a bound above its distance: lengths of rests are exact to some 1e-3 of those of the images.
        slack = 1e-3 * keys.norm()
        bounds = ((self._of_training - keys).square().sum(1).sqrt() - slack).clamp(min=0).square()
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

    def usual(self, images: Tensor, n: int = USUAL) -> float:
        """Median distance, in levels, of up to n images uint8 (N, C, H, W) of a test set from their nearest training images."""
        return float(torch.stack([self.nearest(image, 1).distances[0] for image in subset(images, n)]).median())
