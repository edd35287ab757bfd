"""Mode counts: how many classes the samples hit, and how far the histogram of their classes is from that of real images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from glf_fast.metrics.estimates import GROUPS, Estimate, TooFew, group_counts, jackknife

__all__ = ["ModeCounts", "mode_counts"]


class ModeCounts(NamedTuple):
    """Number of modes that the samples hit, of `modes`, without an interval; KL(q ‖ uniform) and KL(q ‖ r) in nats, q and r
    being the histograms of samples and of real images."""

    hit: Estimate
    modes: int
    kl_uniform: Estimate
    kl_reference: Estimate


def mode_counts(samples: Tensor, reference: Tensor, modes: int) -> ModeCounts:
    """Histograms of the modes of samples and of real images, compared.

    The histogram r of real images is (count + 1)/(N + modes), Laplace's rule, so that a mode that no real image happens to have
    does not make the divergence infinite. The number of modes hit has no interval: it is a sum over rare events, of which the
    jackknife knows nothing (2 of 100 modes hit would have 0.01 … 3.99).

    Args:
        samples, reference: modes (N,) and (M,), integers 0 … modes − 1.

    Raises:
        TooFew: no samples or no real images.
        ValueError: a mode that is not in 0 … modes − 1.
    """
    if not (len(samples) and len(reference)):
        raise TooFew("mode counts need at least one image on either side")
    if (highest := int(max(samples.max(), reference.max()))) >= modes:
        raise ValueError(f"modes must be in 0 … {modes - 1}; got {highest}")
    groups = group_counts(samples, modes)
    counts = torch.bincount(reference.to(samples.device), minlength=modes).double()
    smoothed = (counts + 1) / (counts.sum() + modes)

    def statistics(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = counts / counts.sum(-1, keepdim=True)
        entropy = -torch.xlogy(q, q).sum(-1)
        cross = -(q * smoothed.log()).sum(-1)
        return (counts > 0).sum(-1).double(), math.log(modes) - entropy, cross - entropy

    values = statistics(groups.sum(0))
    bounds = [(0, modes), (0, math.log(modes)), (0, math.inf)]
    if len(samples) < 2 * GROUPS:
        estimates = [Estimate(max(0.0, float(value)), None) for value in values]
    else:
        without = statistics(groups.sum(0) - groups)
        estimates = [
            jackknife(max(0.0, float(value)), spread, *bound)
            for value, spread, bound in zip(values, without, bounds, strict=True)
        ]
    hit, uniform, from_reference = estimates
    return ModeCounts(Estimate(hit.value, None), modes, uniform, from_reference)
