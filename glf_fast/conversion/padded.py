"""A flow on more columns than the data has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glf_fast.flow import Flow
from glf_fast.flow.indices import Indices

__all__ = ["Padded"]


class Padded(Flow):
    """A flow on (B, D′) as one on (B, D): x gets D′ − D zero columns, which the flow must leave zero at no log-
    determinant.

    Args:
        flow: on D′ columns.
        dim: D.
        order: (D′,), the column of [x, zeros] that each of the flow's outputs belongs to.
    """

    order: Tensor
    restore: Tensor

    def __init__(self, flow: Flow, dim: int, order: Tensor) -> None:
        super().__init__((dim,), context_shape=flow.context_shape)
        self.flow = flow
        self.register_buffer("order", order)
        self.register_buffer("restore", order.argsort()[:dim])
        self._indices = Indices("order", order), Indices("restore", self.restore, len(order))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, D) → z (B, D), logdet (B,)."""
        self._check_event("x", x)
        z, logdet = self.flow(F.pad(x, (0, len(self.order) - x.shape[1])), context)
        return z.index_select(1, self._indices[1].check(self.restore)), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, D) → x (B, D), logdet (B,)."""
        self._check_event("z", z)
        padded = F.pad(z, (0, len(self.order) - z.shape[1]))
        x, logdet = self.flow.inverse(padded.index_select(1, self._indices[0].check(self.order)), context)
        return torch.narrow(x, 1, 0, z.shape[1]), logdet

    def train(self, mode: bool = True) -> Padded:
        """Set the mode; averaged indices are restored, as in CouplingFlow."""
        super().train(mode)
        for indices, buffer in zip(self._indices, (self.order, self.restore), strict=True):
            indices.check(buffer)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for indices, buffer in zip(self._indices, (self.order, self.restore), strict=True):
            indices.check(buffer)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for indices, buffer in zip(self._indices, (self.order, self.restore), strict=True):
            indices.load(buffer, errors)
