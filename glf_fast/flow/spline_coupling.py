"""Spline coupling layer with any conditioner network, for vectors and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.coupling import Coupling
from glf_fast.flow.masks import ChannelHalves, Checkerboard
from glf_fast.ops.checks import check_spline
from glf_fast.reference import Spline

__all__ = ["SplineCoupling", "spline_of"]


class SplineCoupling(Coupling):
    """z_v = a rational-quadratic spline of v, z_p = p, with x in two parts (p, v); log|det J| = Σ log y'.

    Neural Spline Flows (arXiv:1906.04032), section 3. The conditioner makes n = spline.columns numbers for each channel of v,
    side by side: (B, T·n, …) of [p, context] (B, P + C, …). It runs once in either direction.

    Args:
        dim, conditioner, mask, flip, undo, pass_context: as in `AffineCoupling`.
        spline: its kind, see `glf_fast.Spline`; or the same as a mapping.

    Example:
        >>> coupling = SplineCoupling(6, MLP(3, [32], 3 * 23), spline=Spline(bins=8))
        >>> z, logdet = coupling(torch.zeros(4, 6))
        >>> z.shape, logdet.shape
        (torch.Size([4, 6]), torch.Size([4]))
    """

    def __init__(
        self,
        dim: int,
        conditioner: nn.Module,
        *,
        spline: Spline | Mapping[str, Any] | None = None,
        mask: str | Sequence[bool] | Tensor = "channels",
        flip: bool = False,
        undo: bool = False,
        pass_context: bool = False,
    ) -> None:
        super().__init__(dim, conditioner, mask=mask, flip=flip, undo=undo, pass_context=pass_context)
        self.spline = spline_of(spline)

    @property
    def columns(self) -> int:
        """Numbers that the conditioner makes for each channel of v."""
        return self.spline.columns

    def transform(
        self, v: Tensor, raw: Tensor, parts: ChannelHalves | Checkerboard, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """The splines of v and the sums of their log-derivatives."""
        if not isinstance(raw, Tensor):
            raise TypeError(f"the conditioner of splines must return one tensor; got {type(raw).__name__}")
        parameters = parts.of_v(raw).unflatten(1, (-1, self.columns)).movedim(2, -1)
        return ops.spline(v, parameters, self.spline, inverse=inverse, event_dims=v.ndim - 1)

    def formula(self) -> str:
        """The map of v, as repr shows it."""
        return str(self.spline)


def spline_of(given: Spline | Mapping[str, Any] | None) -> Spline:
    """The kind of a spline from what a user or a configuration gives; None is the default one.

    Raises:
        ValueError, TypeError: it is none.
    """
    if isinstance(given, Mapping):
        if unknown := set(given) - set(Spline._fields):
            raise ValueError(
                f"a spline has no {', '.join(sorted(map(str, unknown)))}; it has {', '.join(Spline._fields)}"
            )
        given = Spline(**given)
    spline = Spline() if given is None else given
    check_spline(spline)
    return spline
