"""Noise of another shape than the data."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Reshaped"]


class Reshaped(nn.Module):
    """Noise (B, *noise) as (B, *event_shape): a squeezed image, or a vector, with the shape of the data."""

    def __init__(self, noise: tuple[int, ...], event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.noise, self.event_shape = noise, event_shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, *noise) → (B, *event_shape), logdet 0."""
        return x.reshape(-1, *self.event_shape), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, *event_shape) → (B, *noise), logdet 0."""
        return z.reshape(-1, *self.noise), z.new_zeros(len(z))
