"""A fixed matrix over the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops

__all__ = ["FixedLinear"]


class FixedLinear(nn.Module):
    """y = x W over the channels of vectors (B, D) or images (B, D, H, W), with a W that is not trained.

    log|det J| = pixels·log|det W|.

    Inverse and determinant are computed once. W is a buffer, so that it is saved with the flow.

    Args:
        weight: W (D, D), invertible.
    """

    linear = "fixed"
    weight: Tensor
    weight_inverse: Tensor
    logabsdet: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
            raise ValueError(f"weight must be a square matrix (dim, dim); got {tuple(weight.shape)}")
        weight = weight.detach().contiguous()
        self.dim = len(weight)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_inverse", _inverse(weight))
        self.register_buffer("logabsdet", torch.linalg.slogdet(weight)[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedLinear:
        before = self.weight.dtype.itemsize
        super()._apply(fn, recurse)
        if self.weight.dtype.itemsize > before:  # an inverse in float32 is none in float64
            self.weight_inverse = _inverse(self.weight)
            self.logabsdet = torch.linalg.slogdet(self.weight)[1]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        saved = state_dict.get(f"{prefix}weight_inverse")
        if saved is not None and saved.dtype.itemsize < self.weight.dtype.itemsize:
            self.weight_inverse = _inverse(self.weight)
            self.logabsdet = torch.linalg.slogdet(self.weight)[1]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x W and its logdet (B,); the context is not used."""
        return ops.invertible_linear(x, self.weight, self.weight.new_zeros(self.dim), self.logabsdet)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z W⁻¹ and its logdet (B,)."""
        offset = self.weight.new_zeros(self.dim)
        return ops.invertible_linear(z, self.weight_inverse, offset, self.logabsdet, inverse=True)

    def extra_repr(self) -> str:
        """Shown by repr."""
        return str(self.dim)


def _inverse(weight: Tensor) -> Tensor:
    return torch.linalg.inv(weight).contiguous()  # linalg returns columns first, which safetensors does not take
