"""The Inception score of images by any classifier."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from glf_fast.metrics.estimates import GROUPS, Estimate, TooFew, jackknife

__all__ = ["inception_score"]

_CHUNK = 50 * GROUPS  # a multiple, so that the groups of all chunks are the same rows


def inception_score(logits: Tensor) -> Estimate:
    """exp E_x KL(p(y|x) ‖ p(y)), p(y) = E_x p(y|x) (Salimans et al., arXiv:1606.03498, section 4), between 1 and K.

    It is high if each image has one clear class and all classes are there. It is computed over all images at once, not over ten
    parts, because few images bias it downwards (Barratt & Sharma, arXiv:1801.01973).

    Args:
        logits: (N, K), N ≥ 1, of a classifier with K classes.

    Raises:
        TooFew: no images.
    """
    if not len(logits):
        raise TooFew("an Inception score needs at least one image")
    classes, n = logits.shape[1], len(logits)
    sums = torch.zeros(GROUPS, classes, dtype=torch.float64, device=logits.device)
    negative_entropies = sums.new_zeros(GROUPS, 1)
    for part in logits.split(_CHUNK):
        log_p = part.double().log_softmax(1)
        sums += _by_group(log_p.exp())
        negative_entropies += _by_group((log_p.exp() * log_p).sum(1, keepdim=True))
    counts = _by_group(torch.ones(n, 1, dtype=torch.float64, device=sums.device))[:, 0]

    def score(sums: Tensor, negative_entropies: Tensor, n: Tensor) -> Tensor:
        marginal = sums / n[..., None]
        return (negative_entropies[..., 0] / n - torch.xlogy(marginal, marginal).sum(-1)).exp()

    totals = sums.sum(0), negative_entropies.sum(0), counts.sum()
    value = float(score(*totals))
    if n < 2 * GROUPS:
        return Estimate(value, None)
    without = score(totals[0] - sums, totals[1] - negative_entropies, totals[2] - counts)
    return jackknife(value, without, 1, classes)


def _by_group(rows: Tensor) -> Tensor:
    """The sums (20, k) of every 20th of the rows (N, k)."""
    return F.pad(rows, (0, 0, 0, -len(rows) % GROUPS)).view(-1, GROUPS, rows.shape[1]).sum(0)
