"""A flow the other way round."""

from __future__ import annotations

from torch import Tensor

from glf_fast.flow.base import Flow

__all__ = ["Inverse"]


class Inverse(Flow):
    """z = flow⁻¹(x): a flow's two directions exchanged, for maps that are cheap or known in the other direction only.

    Example:
        >>> flow = Inverse(CouplingFlow(4, 2, (8,)))
        >>> x, z = torch.randn(3, 4), torch.randn(3, 4)
        >>> bool((flow(x)[0] == flow.flow.inverse(x)[0]).all())
        True
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.event_shape, context_shape=flow.context_shape)
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise by the flow's inverse: x (B, *event_shape) → z like x, logdet (B,)."""
        return self.flow.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data by the flow's forward: z (B, *event_shape) → x like z, logdet (B,)."""
        z, logdet = self.flow(z, context)
        return z, logdet
