"""A fused flow as a layer of a library, in the library's own interface and direction.

They are ordinary modules: the libraries call their layers by these methods and ask nothing more of them, so that no
library is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from glf_fast.conversion.images.modules import OnChannels
from glf_fast.flow import Flow

__all__ = ["FreiaLayer", "FusedLayer", "NflowsLayer", "NormflowsLayer", "PassedOn", "ZukoLayer"]


class FusedLayer(nn.Module):
    """What the layers of all libraries have in common here."""

    def __init__(self, flow: Flow | OnChannels) -> None:
        super().__init__()
        self.flow = flow

    def _given(self, context: Tensor | None) -> Tensor | None:
        """The context, for a flow that takes one: a library hands it to all its layers.

        On images it is for the library's own networks, which know what to do with it.
        """
        return context if isinstance(self.flow, OnChannels) or self.flow.context_dim else None


class NormflowsLayer(FusedLayer):
    """normflows: `forward` is noise → data."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, *shape) → x like z, logdet (B,)."""
        return self.flow.inverse(z, self._given(context))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, *shape) → z like x, logdet (B,)."""
        return self.flow(x, self._given(context))


class NflowsLayer(FusedLayer):
    """nflows: a transform, `forward` is data → noise."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: (B, *shape) → the same, logdet (B,)."""
        return self.flow(inputs, self._given(context))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: (B, *shape) → the same, logdet (B,)."""
        return self.flow.inverse(inputs, self._given(context))


class FreiaLayer(FusedLayer):
    """FrEIA: an invertible module, tuples in and out.

    Args:
        dims_in, dims_c: shapes of a sample and of its conditions, as FrEIA gives them to its modules.
    """

    def __init__(
        self, flow: Flow | OnChannels, dims_in: Sequence[Sequence[int]], dims_c: Sequence[Sequence[int]] = ()
    ) -> None:
        super().__init__(flow)
        self.dims_in = list(dims_in)
        self.dims_c = list(dims_c)

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """((B, *shape),) → the same, logdet (B,); noise → data if `rev`."""
        context = self._given(torch.cat(list(c), 1)) if c else None
        y, logdet = self.flow.inverse(x[0], context) if rev else self.flow(x[0], context)
        return (y,), logdet

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes stay."""
        return input_dims


class PassedOn(nn.Module):
    """The place in a FrEIA graph of a module that was fused into another one: hands its input on."""

    dims_c: Sequence[Sequence[int]] = ()

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes stay."""
        return input_dims

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], float]:
        """((B, *shape),) → the same, 0."""
        return (x[0],), 0.0


class ZukoLayer(FusedLayer):
    """zuko: a lazy transform, which a context makes a transform data → noise; on vectors."""

    flow: Flow

    def forward(self, c: Tensor | None = None) -> Transform:
        """The transform given c (…, C)."""
        return _Given(self.flow, self._given(c))


class _Given(Transform):
    """A flow and its context as a transform of torch.distributions, data → noise, with zuko's `call_and_ladj`."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: Flow, context: Tensor | None) -> None:
        super().__init__()
        self.flow = flow
        self.context = context

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(…, D) → (…, D), log|det| (…), in one evaluation."""
        return self._run(x, inverse=False)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of data → noise at x, (…)."""
        return self._run(x, inverse=False)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self._run(x, inverse=False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._run(y, inverse=True)[0]

    def _run(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        batch, context = x.shape[:-1], self.context
        if context is not None:
            context = context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])
        direction: Any = self.flow.inverse if inverse else self.flow
        y, logdet = direction(x.reshape(-1, x.shape[-1]), context)
        return y.reshape(*batch, y.shape[-1]), logdet.reshape(batch)
