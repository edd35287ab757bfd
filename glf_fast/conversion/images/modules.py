"""Layers on images in the place of a library's own, which are not told how many pixels or what context they are given."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from glf_fast.flow.sequential import run_layers

__all__ = ["OnChannels"]


class OnChannels(nn.Module):
    """A `SequentialFlow` on images of any number of pixels; a context of any kind is handed to all layers."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, C, …) → z like x, logdet (B,)."""
        return run_layers(self.layers, x, context, [], inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, C, …) → x like z, logdet (B,)."""
        return run_layers(self.layers, z, context, [], inverse=True)
