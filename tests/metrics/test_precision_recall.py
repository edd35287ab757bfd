"""Precision and recall against sets whose manifolds are known, and against the definition."""

import pytest
import torch

from glf_fast.metrics import FeatureStats, neighbours, precision_recall
from glf_fast.metrics.precision_recall import PrecisionRecall


def seen(x: torch.Tensor, keep: int = 10**6, **options: object) -> FeatureStats:
    stats = FeatureStats(x.shape[1], keep=keep, **options)
    stats.update(x)
    return stats


def draws(n: int, seed: int, dim: int = 4) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def naive(fake: torch.Tensor, real: torch.Tensor, k: int) -> tuple[float, float]:
    """Equations 1 and 2 of arXiv:1904.06991, with one loop for each quantifier."""

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b.double()).square().sum())

    def covered(points: torch.Tensor, centres: torch.Tensor) -> float:
        radii = [sorted(distance(a, b) for j, b in enumerate(centres) if j != i)[k - 1] for i, a in enumerate(centres)]
        hits = [any(distance(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(hits) / len(hits)

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_equals_the_definition(k: int, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", 7)  # chunks, and a last one that is shorter
    fake, real = 1.5 * draws(40, 0) - 1 + offset, draws(40, 1) + offset
    result = precision_recall(seen(fake), seen(real), k)
    assert result == PrecisionRecall(*naive(fake, real, k), 40, k)
    assert 0 < result.precision < 1 and 0 < result.recall < 1


def line(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


COPIES = draws(30, 0, 64) * 100 + 7
CLOSED = {
    "the same set": (COPIES, COPIES.flip(0), 3, 1.0, 1.0),
    "far apart": (draws(30, 0), draws(30, 1) + 100, 3, 0.0, 0.0),
    # Reals at 0, 1, 2, 3 have balls of radius 1: a sample at 4 is on the surface of one, a sample beyond it is outside. The
    # samples' own balls have radii 1, 0.5, 0.5 and 0.5, and reach the real 3 only.
    "on the surface": (line(4, 5, 5.5, 6), line(0, 1, 2, 3), 1, 0.25, 0.25),
    # All samples are one real image: each is real, and their balls of radius 0 hold that image alone.
    "collapsed": (COPIES[:1].expand(30, -1), COPIES, 3, 1.0, 1 / 30),
    # Every real image is there four times, so that its ball has radius 0, and holds the sample that equals it.
    "radius 0": (COPIES[:8].repeat(4, 1), COPIES[4:12].repeat(4, 1), 3, 0.5, 0.5),
    "all are one": (torch.full((9, 3), 0.1), torch.full((9, 3), 0.1), 3, 1.0, 1.0),
}


@pytest.mark.parametrize("case", CLOSED)
def test_known_manifolds(case: str) -> None:
    fake, real, k, precision, recall = CLOSED[case]
    assert precision_recall(seen(fake), seen(real), k)[:2] == (precision, recall)
    assert naive(fake, real, k) == (precision, recall)


def test_equally_many_features_of_either_set() -> None:
    fake, real = draws(50, 0), draws(80, 1)
    more = precision_recall(seen(fake), seen(real, keep=60))
    assert more == precision_recall(seen(fake), seen(real[:50])) and more.n == 50


def test_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"more than k kept features on each side, got 3 and k=3"):
        precision_recall(seen(draws(100, 0)), seen(draws(100, 1), keep=3))
    with pytest.raises(ValueError, match="different extractors"):
        precision_recall(seen(draws(9, 0), extractor={"name": "a"}), seen(draws(9, 0), extractor={"name": "b"}))
