"""A flow whose context is first mapped by a network."""

from __future__ import annotations

from torch import Tensor, nn

from glf_fast.flow.base import Flow
from glf_fast.ops.checks import check_tensors

__all__ = ["Embedded"]


class Embedded(Flow):
    """A flow and a network that embeds its context, trained together: flow(x, embedding(context)).

    nflows calls such a network an `embedding_net`.

    Args:
        flow: the flow; it takes embedded contexts.
        embedding: any network that maps a batch of contexts (B, *context_shape) to (B, *flow.context_shape).
        context_shape: shape of one context before the embedding; it may have several dimensions.
    """

    def __init__(self, flow: Flow, embedding: nn.Module, context_shape: tuple[int, ...]) -> None:
        super().__init__(flow.event_shape, context_shape=context_shape)
        self.flow = flow
        self.embedding = embedding

    def embed(self, context: Tensor) -> Tensor:
        """Embedded contexts (…, *flow.context_shape) of contexts (…, *context_shape)."""
        check_tensors(context=context)
        batch = context.shape[: context.ndim - len(self.context_shape)]
        if context.shape[len(batch) :] != self.context_shape:
            wanted = ", ".join(map(str, self.context_shape))
            raise ValueError(f"context must have shape (…, {wanted}); got {tuple(context.shape)}")
        return self.embedding(context.reshape(-1, *self.context_shape)).reshape(*batch, *self.flow.context_shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, *event_shape), context (B, *context_shape) or one context for all → z like x, logdet (B,)."""
        return self.flow(x, self._embedded(context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, *event_shape), context (B, *context_shape) or one context for all → x like z, logdet (B,)."""
        return self.flow.inverse(z, self._embedded(context))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | context) in nats, (B,)."""
        return self.flow.log_prob(x, self._embedded(context))

    def _embedded(self, context: Tensor | None) -> Tensor:
        if context is None:
            raise ValueError(f"this flow is conditional; give contexts of shape {self.context_shape}")
        return self.embed(context)
