"""KID: the unbiased polynomial maximum mean discrepancy of two sets of features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glf_fast.metrics.estimates import TooFew
from glf_fast.metrics.stats import FeatureStats

__all__ = ["KID", "kid"]


class KID(NamedTuple):
    """Mean and standard deviation of the estimate over `blocks` pairs of blocks of `block` features each."""

    mean: float
    std: float
    blocks: int
    block: int


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD² (a U-statistic) of x and y (m, d) with the kernel (x·y/d + 1)³. The value may be negative."""
    m, d = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1) ** 3

    def off_diagonal_mean(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (m * (m - 1))

    return off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean()


def kid(a: FeatureStats, b: FeatureStats, block: int = 1000) -> KID:
    """Kernel Inception Distance (Bińkowski et al., arXiv:1801.01401, section 4) between the kept features of `a` and `b`.

    The kept features, which must be in random order, are divided into disjoint blocks of `block` features, or of fewer
    features if there would be less than ten blocks. Each feature is used once and nothing is drawn at random, so the same
    features give the same numbers. KID is unbiased for any number of features; the error of the mean is about std/√blocks.

    Raises:
        TooFew: fewer than four features kept on either side.
        UserError: different extractors.
    """
    a.check_comparable(b)
    n = min(len(a.kept), len(b.kept))
    if n < 4 or block < 2:
        raise TooFew(f"KID needs at least four kept features on each side and block ≥ 2, got {n} and block={block}")
    block = max(2, min(block, n // 10))
    pairs = zip(a.kept.split(block), b.kept.split(block), strict=False)
    values = torch.stack(
        [_mmd2(x.double(), y.to(x.device).double()) for x, y in pairs if len(x) == block and len(y) == block]
    )
    return KID(float(values.mean()), float(values.std()), len(values), block)
