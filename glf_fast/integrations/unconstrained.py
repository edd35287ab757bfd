"""A map between the support of a prior and all of ℝᴰ, so that an estimated density is 0 outside of the support."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

__all__ = ["Unconstrained"]


class Unconstrained(nn.Module):
    """The fixed map z = log(θ − low) − log(high − θ) in each dimension, as a layer of a flow: θ (B, D) → z (B, D).

    A term whose bound is infinite is left out; z = θ if both bounds are infinite. Outside of the bounds the density is 0.

    Args:
        low, high: bounds (D,), infinite where there is no bound.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())

    @classmethod
    def of(cls, prior: Distribution, dim: int) -> Unconstrained:
        """The map for the support of a distribution of vectors (D,).

        Raises ValueError unless the support is an interval, bounded or not, in each dimension.
        """
        try:
            low, high = _bounds(prior.support, dim)
        except (AttributeError, NotImplementedError) as error:
            raise ValueError(f"the prior, {type(prior).__name__}, does not say what its support is") from error
        except RuntimeError as error:  # bounds of another shape, as those of a mixture
            raise ValueError(f"the prior's support, {prior.support}, does not bound {dim} dimensions") from error
        return cls(low, high)

    def forward(self, theta: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, D) in ℝᴰ, and logdet (B,), which is −∞ outside of the bounds."""
        below, above, width, least = self._distances(theta)
        # A sample of a uniform distribution may lie on its bound.
        a, b = (torch.where(gap.isfinite(), gap, 1.0).clamp_min(least).log() for gap in (below, above))
        z = torch.where(below.isinf() & above.isinf(), theta, a - b)
        logdet = (width.log() - a - b).sum(1)
        return z, torch.where(((below >= 0) & (above >= 0)).all(1), logdet, -torch.inf)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """θ (B, D) between the bounds, and logdet (B,)."""
        _, _, width, _ = self._distances(z)
        has_low, has_high = self.low.isfinite(), self.high.isfinite()
        both, one = has_low & has_high, has_low ^ has_high
        # log of the distance from the bound, where there is exactly one bound; elsewhere 0, so that gradients of e^gap are
        # finite.
        gap = torch.where(one, torch.where(has_low, z, -z), 0.0)
        theta = torch.where(one, torch.where(has_low, self.low + gap.exp(), self.high - gap.exp()), z)
        theta = torch.where(both, self.low + width * torch.sigmoid(z), theta)
        slope = width.log() + F.logsigmoid(z) + F.logsigmoid(-z)
        return theta, torch.where(both, slope, gap).sum(1)

    def _distances(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """θ − low, high − θ, high − low (1 without both bounds), and the least distance from a bound that is used."""
        info = torch.finfo(theta.dtype)
        width = self.high - self.low
        bounded = width.isfinite()
        width = torch.where(bounded, width, 1.0)
        return theta - self.low, self.high - theta, width, torch.where(bounded, info.eps * width, info.tiny)


def _bounds(support: constraints.Constraint | None, dim: int) -> tuple[Tensor, Tensor]:
    """The lowest and highest value (dim,) in each dimension."""
    base = getattr(support, "base_constraint", None)
    if base is not None:  # independent
        return _bounds(base, dim)
    if isinstance(support, constraints.cat):
        sizes = support.lengths
        parts = [_bounds(part, n) for part, n in zip(support.cseq, sizes, strict=True)]
        low, high = (torch.cat(ends) for ends in zip(*parts, strict=True))
        return low, high
    intervals = (
        constraints.interval, constraints.half_open_interval, constraints.greater_than, constraints.greater_than_eq,
        constraints.less_than, type(constraints.real),
    )  # fmt: skip
    if not isinstance(support, intervals):
        raise ValueError(f"the prior's support must be an interval in each dimension; got {support}")
    ends = (getattr(support, "lower_bound", -torch.inf), getattr(support, "upper_bound", torch.inf))
    low, high = (torch.as_tensor(end, dtype=torch.get_default_dtype()).flatten().expand(dim) for end in ends)
    return low, high
