"""Spectral normalisation: layers whose weight matrix has the largest singular value 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrize import register_parametrization

__all__ = ["spectral_norm"]


def spectral_norm(network: nn.Module) -> None:
    """Divide the weight of every convolution and dense layer by its largest singular value, from now on, in place.

    The weight is taken as a matrix with a row for each output channel (Miyato et al., arXiv:1802.05957). Like
    `torch.nn.utils.parametrizations.spectral_norm`, this finds the singular value by a step of the power method at each pass in
    training mode. It differs in two ways. The power method stays float32 under autocast. And models whose buffers were
    averaged are right, because the singular value is computed from the direction of a single vector, whatever its length.
    """
    for layer in list(network.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            outputs = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            register_parametrization(layer, "weight", _SpectralNorm(layer.weight, outputs))


class _SpectralNorm(nn.Module):
    """W ↦ W/σ, σ = ‖W v‖, where v becomes the first right singular vector of W."""

    vector: Tensor

    def __init__(self, weight: Tensor, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs  # the dimension of the output channels
        matrix = self._matrix(weight.detach())
        self.register_buffer("vector", torch.randn_like(matrix[0]))
        for _ in range(20):  # steps enough for weights that were drawn at random, whose first singular values are close
            self._step(matrix)

    def forward(self, weight: Tensor) -> Tensor:
        """weight → weight/σ, of the same shape."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = self._matrix(weight)
            if self.training:
                self._step(matrix)
            return weight / torch.linalg.vector_norm(matrix @ normalize(self.vector, dim=0))

    @torch.no_grad()
    def _step(self, matrix: Tensor) -> None:
        self.vector.copy_(normalize(matrix.mT @ normalize(matrix @ self.vector, dim=0), dim=0))

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.outputs, 0).flatten(1)
