"""References for scores: statistics of real images, cached by their content, and distances between real images."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glf_fast.distributed import by_main
from glf_fast.errors import UserError
from glf_fast.files import cache_dir
from glf_fast.metrics.collect import collect
from glf_fast.metrics.extractors import Extractor
from glf_fast.metrics.frechet import frechet_distance
from glf_fast.metrics.stats import FeatureStats

if TYPE_CHECKING:
    from glf_fast.data import ImageDataset

__all__ = ["Reference", "all_features", "dataset_stats", "reference", "subset"]

# Number of features kept for KID and the exact path; with Inception's 2048 dimensions the file takes 150 MB.
KEEP = 10_000


@dataclass(frozen=True)
class Reference:
    """Statistics of real images by one extractor.

    Attributes:
        test: statistics of the test split, against which models are scored (scores against training images would reward
            copies of them).
        floors: distances between real images. No model should be expected to fall below a floor. "train/train" is the distance
            between two disjoint sets of training images, "train/test" the distance of training images from test images.
        protocol: data set and number of images, JSON-ready.
        train: statistics of the first set of training images.
    """

    test: FeatureStats
    floors: dict[str, float]
    protocol: dict[str, Any]
    train: FeatureStats


def reference(train: ImageDataset, test: ImageDataset, extractor: Extractor, *, n: int = 10_000) -> Reference:
    """Statistics of `n` test images, and the floors from two disjoint sets of `n` training images.

    Fewer images are used where a split has fewer; each of the two training sets is at most half of the split. The floors are
    comparable with the score of a model only for the same number of images. Statistics are cached by `dataset_stats`.

    Raises:
        UserError: fewer than two test or four training images.
    """
    if len(test.images) < 2 or len(train.images) < 4 or n < 2:
        raise UserError(
            f"a reference needs n ≥ 2, two or more test images and four or more training images; got n={n}, "
            f"{len(test.images)} of {test.name}:{test.split} and {len(train.images)} of {train.name}:{train.split}"
        )
    half = min(n, len(train.images) // 2)
    first, second = (dataset_stats(train, extractor, n=half, part=part) for part in (0, 1))
    held_out = dataset_stats(test, extractor, n=n)
    distance = by_main(frechet_distance)
    floors = {"train/train": distance(first, second), "train/test": distance(first, held_out)}
    counts = {"train/train": [first.n, second.n], "train/test": [first.n, held_out.n]}
    return Reference(
        held_out, floors, {"reference": held_out.source, "floors": counts, "training_policy": train.policy}, first
    )


def dataset_stats(dataset: ImageDataset, extractor: Extractor, *, n: int | None = None, part: int = 0) -> FeatureStats:
    """Statistics of `n` images of a data set (default all) with 10,000 features kept, from the cache or computed and cached.

    Part p holds the images p·n … (p+1)·n − 1 of a fixed random order, so parts are disjoint. The cache is `cache_dir()/stats`.
    Its key is a hash of the data set's fingerprint, the selection, the extractor's identity and this package's code, so stale
    statistics are never read. A damaged file is computed again. If the cache cannot be written, a notice is printed.
    """
    total = len(dataset.images)
    n = total if n is None else min(n, total)
    source = {
        "name": dataset.name,
        "split": dataset.split,
        "fingerprint": dataset.fingerprint,
        "policy": dataset.policy,
        "n": n,
        "part": part,
    }
    return _stats(
        lambda: subset(dataset.images, n, part),
        extractor,
        KEEP,
        source,
        f"{Path(dataset.name).name}-{dataset.split}-{n}-{part}",
        f"{dataset.name}:{dataset.split}",
    )


def all_features(images: Tensor, extractor: Extractor) -> Tensor:
    """Features (n, dim), float32, of all images (n, C, H, W), uint8, in their order, from the cache or computed and cached.

    A file takes 4·n·dim bytes: 123 MB for 60,000 images and VGG16's 512 features, which one core computes in ten minutes.
    """
    digest = hashlib.sha256(images.cpu().contiguous().numpy().data).hexdigest()
    source = {"images": digest, "image_shape": list(images.shape[1:]), "n": len(images)}
    return _stats(lambda: images, extractor, None, source, f"all-{len(images)}", "the training set").kept


def _stats(
    images: Callable[[], Tensor], extractor: Extractor, keep: int | None, source: dict[str, Any], name: str, title: str
) -> FeatureStats:
    key = hashlib.sha256(json.dumps([source, extractor.identity, _code()], sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "stats" / f"{name}-{extractor.name}-{key[:16]}.safetensors"
    if cached := by_main(_cached)(path, source, extractor.identity):
        return cached
    _notice(
        f"computing the features for {extractor.label} of {source['n']} images of {title} (to be cached in {path.parent})"
    )
    return by_main(_to_cache)(collect(images(), extractor, keep=keep, source=source), path)


def _cached(path: Path, source: dict[str, Any], extractor: dict[str, Any]) -> FeatureStats | None:
    """The statistics of this source by this extractor in a file of the cache; None where it has no such statistics."""
    try:
        stats = FeatureStats.load(path)
        same = all(stats.source.get(key) == value for key, value in source.items())
        if same and stats.extractor == extractor and stats.n == source["n"]:
            return stats
        _notice(f"{path} holds other statistics than its name says; computing the statistics again")
    except FileNotFoundError:
        pass
    except (UserError, OSError) as error:
        _notice(f"{error}; computing the statistics again")
    return None


def _to_cache(stats: FeatureStats, path: Path) -> FeatureStats:
    """The statistics with their root, after they were written to a file of the cache, if they could be."""
    stats.root()
    try:
        stats.save(path)
    except OSError as error:
        _notice(f"the statistics could not be cached ({error}); the next run will compute them again")
    return stats


def subset(images: Tensor, n: int, part: int = 0) -> Tensor:
    """Images part·n … (part+1)·n − 1 of a fixed random order; the order is random because files may be sorted by class."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[part * n : (part + 1) * n]]


@cache
def _code() -> str:
    """Hash of this package's source code, so that a change of the code invalidates all cached statistics."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _notice(message: str) -> None:
    print(f"glf_fast.metrics: {message}", file=sys.stderr)
