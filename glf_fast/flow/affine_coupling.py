"""Affine coupling layer with any conditioner network, for vectors and images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.coupling import Coupling
from glf_fast.flow.glow_network import GlowNetwork
from glf_fast.flow.hooks import has_hooks
from glf_fast.flow.masks import ChannelHalves, Checkerboard
from glf_fast.ops.checks import check_channels, check_log_scale
from glf_fast.reference import LOG_SCALES

__all__ = ["AffineCoupling"]


class AffineCoupling(Coupling):
    """z_v = v·e^f(u) + t, z_p = p, with x in two parts (p, v) and (u, t) = conditioner([p, context]); log|det J| = Σ f(u).

    RealNVP (arXiv:1605.08803), eqs. 4–9. The conditioner runs once in either direction.

    | `mask`         | v is                             | the conditioner is given                      | and returns u and t |
    |----------------|----------------------------------|-----------------------------------------------|---------------------|
    | "channels"     | the last T = D//2 channels       | p (B, D − T, …)                               | (B, T, …) each      |
    | D booleans     | the T channels that are True     | p (B, D − T, …)                               | (B, T, …) each      |
    | "checkerboard" | every second pixel, (0, 1) first | x (B, D, H, W) with zeros in the places of v  | (B, D, H, W) each   |

    Args:
        dim: channels D of the input (B, D) or (B, D, H, W); at least 2, unless pixels are masked.
        conditioner: any network from [p, context] (B, P + C, …) to [u, t] (B, 2·T, …), or to the pair (u, t); to t alone if
            `additive`. On a processor images may come in `torch.channels_last` order, in which convolutions are faster.
        additive: z_v = v + t, NICE (arXiv:1410.8516): no scale, logdet 0. The log-scale and `add_first` mean nothing then.
        log_scale, log_scale_constant: name and constant of f, see `glf_fast.reference.log_scale`.
        add_first: z_v = (v + t)·e^f(u), as in Glow (arXiv:1807.03039).
        mask: how x is divided, see the table.
        flip: the other way round: the first T channels given the last D − T; the channels that are False; the other pixels.
        undo: data → noise is the inverse of the formula: z_v = (v − t)·e^−f(u), so that v ~ N(t, e^2f(u)) becomes N(0, 1).
        pass_context: call conditioner(p, context), for a network with a use of its own for contexts of any shape. Without it
            the context, (B, C) or (B, C, H, W), becomes further channels of p.

    Example:
        >>> coupling = AffineCoupling(6, MLP(3, [32], 6))
        >>> z, logdet = coupling(torch.zeros(4, 6))
        >>> z.shape, logdet.shape
        (torch.Size([4, 6]), torch.Size([4]))
    """

    def __init__(
        self,
        dim: int,
        conditioner: nn.Module,
        *,
        additive: bool = False,
        log_scale: str = "tanh",
        log_scale_constant: float | None = None,
        add_first: bool = False,
        mask: str | Sequence[bool] | Tensor = "channels",
        flip: bool = False,
        undo: bool = False,
        pass_context: bool = False,
    ) -> None:
        check_log_scale(log_scale, log_scale_constant)
        super().__init__(dim, conditioner, mask=mask, flip=flip, undo=undo, pass_context=pass_context)
        self.additive = additive
        self.log_scale = log_scale
        self.log_scale_constant = LOG_SCALES[log_scale] if log_scale_constant is None else log_scale_constant
        self.add_first = add_first

    @property
    def columns(self) -> int:
        """Numbers that the conditioner makes for each channel of v."""
        return 1 if self.additive else 2

    def couple(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """`Coupling.couple`; with Glow's network of the right sizes as one operation."""
        check_channels("x", x, self.dim)
        network, halves = self.conditioner, self._halves
        if (
            type(self) is not AffineCoupling  # a subclass may do something else in between
            or type(network) is not GlowNetwork
            or has_hooks(network)
            or halves is None
            or network.first.weight.shape[1] != self.dim - halves.outputs + 1
            or network.last.shape[0] != 2 * halves.outputs
            or context is not None
            or self.additive
            or x.ndim != 4
            or x.dtype.itemsize < 4
        ):
            return super().couple(x, context, inverse=inverse)
        network.start(halves.divide(x)[0])
        return ops.glow_coupling(
            x,
            *network.tensors(),
            network.gain_factor,
            v_first=halves.v_first,
            log_scale=self.log_scale,
            log_scale_constant=self.log_scale_constant,
            add_first=self.add_first,
            inverse=inverse != self.undo,
        )

    def transform(
        self,
        v: Tensor,
        raw: Tensor | tuple[Tensor | None, Tensor],
        parts: ChannelHalves | Checkerboard,
        *,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """v·e^f(u) + t and Σ f(u), of raw [u, t], the pair (u, t), or t alone."""
        u, t = raw if isinstance(raw, tuple) else (None, raw) if self.additive else raw.chunk(2, 1)
        if u is None:
            dtype = torch.promote_types(v.dtype, torch.float32)
            t, v = parts.of_v(t).to(dtype), v.to(dtype)
            return v - t if inverse else v + t, v.new_zeros(len(v))
        return ops.affine_coupling(
            v,
            parts.of_v(u),
            parts.of_v(t),
            log_scale=self.log_scale,
            log_scale_constant=self.log_scale_constant,
            add_first=self.add_first,
            inverse=inverse,
        )

    def formula(self) -> str:
        """The map of v, as repr shows it."""
        constant = "" if self.log_scale_constant is None else f"({self.log_scale_constant:g})"
        scale = "additive=True" if self.additive else f"log_scale={self.log_scale}{constant}"
        return scale + ", add_first=True" * self.add_first
