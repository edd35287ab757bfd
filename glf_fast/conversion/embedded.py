"""A flow whose context goes through a network first."""

from __future__ import annotations

from torch import Tensor, nn

from glf_fast.flow import Flow

__all__ = ["Embedded"]


class Embedded(Flow):
    """flow(x, embedding(context)): nflows' `embedding_net`.

    Args:
        flow: with context_dim columns of embedded context.
        embedding: from a batch of contexts (B, …) to (B, context_dim); any network.
    """

    def __init__(self, flow: Flow, embedding: nn.Module) -> None:
        super().__init__(flow.event_shape, flow.context_dim)
        self.flow = flow
        self.embedding = embedding

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, D), context (B, …) → z (B, D), logdet (B,)."""
        return self.flow(x, None if context is None else self.embedding(context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, D), context (B, …) → x (B, D), logdet (B,)."""
        return self.flow.inverse(z, None if context is None else self.embedding(context))
