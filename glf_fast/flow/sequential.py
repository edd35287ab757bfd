"""A flow built layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from glf_fast.flow.actnorm import ActNorm
from glf_fast.flow.base import Flow
from glf_fast.flow.linear import InvertibleLinear
from glf_fast.reference import log_normal

__all__ = ["SequentialFlow"]


class SequentialFlow(Flow):
    """A chain of layers, z = f_n(… f_1(x)), whose log-determinants are added.

    A layer is any module with `forward(x, context)` and `inverse(z, context)` that return (output, logdet): `ActNorm`,
    `InvertibleLinear`, `AffineCoupling`, another `Flow`, or your own. If the last layer is a flow, its `log_prob` is used.

    Args:
        layers: the layers, first to last in the direction data → noise.
        event_shape: shape of one sample, (D,) or (C, H, W).
        context_dim: number of columns of the context, which every layer gets; 0 for no context.
        context_shape: shape of one context, instead of `context_dim`, if a context is not a vector.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        event_shape: tuple[int, ...],
        context_dim: int = 0,
        *,
        context_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(event_shape, context_dim, context_shape=context_shape)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, *event_shape) → z like x, logdet (B,)."""
        return self._run(iter(self.layers), x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, *event_shape) → x like z, logdet (B,)."""
        return self._run(reversed(self.layers), z, context, inverse=True)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) = log N(z; 0, I) + logdet in nats, (B,). The last layer computes log N if it has a `log_prob`."""
        layers: list[nn.Module] = list(self.layers)
        # A CouplingFlow's own log_prob is one operation. Permutations behind it change nothing about N(0, I).
        while layers and isinstance(layers[-1], InvertibleLinear) and layers[-1].linear == "permutation":
            layers.pop()
        last = layers[-1] if layers else None
        if not (isinstance(last, Flow) or type(last) is ActNorm):
            z, logdet = self._run(iter(layers), x, context, inverse=False)
            return log_normal(z) + logdet
        x, logdet = self._run(iter(layers[:-1]), x, context, inverse=False)
        return last.log_prob(x, context) + logdet

    def _run(
        self, layers: Iterator[nn.Module], x: Tensor, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        self._check_event("z" if inverse else "x", x)
        context = self._expand_context(context, len(x))
        logdet: Tensor | None = None
        for layer in layers:
            x, ldj = layer.inverse(x, context) if inverse else layer(x, context)  # type: ignore[operator]
            logdet = ldj if logdet is None else logdet + ldj
        if logdet is None:
            logdet = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        return x, logdet
