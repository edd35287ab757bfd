"""Feature statistics of a stream of images."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glf_fast import distributed
from glf_fast.errors import UserError
from glf_fast.metrics.extractors import Extractor, check_images
from glf_fast.metrics.stats import FeatureStats

__all__ = ["blocks", "collect", "collect_all"]

# The moments are updated once for each block of this many images. It is a multiple of every extractor's chunk.
BLOCK = 1024


def collect(
    images: Tensor | Iterable[Tensor],
    extractor: Extractor,
    *,
    keep: int | None = None,
    source: Mapping[str, Any] | None = None,
    divided: bool = False,
) -> FeatureStats:
    """Statistics of the features of uint8 images. The result is the same, bit for bit, for any batch size.

    Of several processes (`distributed`) each computes the features of its part of the images, and gets the statistics of all.

    Args:
        images: uint8 (N, C, H, W), or an iterable of such batches.
        keep: number of features to keep, by default all; each takes 4·dim bytes (82 MB for 10,000 Inception features).
        source: description of the images, recorded in the statistics.
        divided: whether `images` are the part of this process already, in the order of processes.
    """
    [stats] = collect_all(images, [extractor], keep=keep, source=source, divided=divided)
    return stats


def collect_all(
    images: Tensor | Iterable[Tensor],
    extractors: Sequence[Extractor],
    *,
    keep: int | None = None,
    source: Mapping[str, Any] | None = None,
    divided: bool = False,
) -> list[FeatureStats]:
    """The statistics of `collect` by each extractor, in one pass over the images."""
    if distributed.size() > 1 and not divided:
        whole = images if isinstance(images, Tensor) else torch.cat(list(images))
        own = distributed.parts(len(whole), BLOCK)[distributed.rank()]
        images = whole[own.start : own.stop]
    found = [
        FeatureStats(
            extractor.dim,
            keep=sys.maxsize if keep is None else keep,
            extractor=extractor.identity,
            source=source,
            device=extractor.device if extractor.device.type == "cuda" else "cpu",
        )
        for extractor in extractors
    ]
    for block in blocks([images] if isinstance(images, Tensor) else images):
        for stats, extractor in zip(found, extractors, strict=True):
            stats.update(extractor(block))
            stats.source["image_shape"] = list(block.shape[1:])
    if distributed.size() > 1:
        for stats in found:
            stats.all_reduce()
    return found


def blocks(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The images of a stream in blocks of exactly BLOCK images; the last block may be shorter."""
    waiting: list[Tensor] = []
    for batch in batches:
        check_images(batch)
        if waiting and batch.shape[1:] != waiting[0].shape[1:]:
            raise UserError(
                f"all images must have one shape; got {tuple(waiting[0].shape[1:])} and then {tuple(batch.shape[1:])}"
            )
        waiting.append(batch)
        if sum(map(len, waiting)) >= BLOCK:
            *full, rest = torch.cat(waiting).split(BLOCK)
            yield from full
            waiting = [rest]
    if waiting and (rest := torch.cat(waiting)).shape[0]:
        yield rest
