"""Networks of the libraries as conditioners: what they are given, and which of their output channels are u and t.

The network itself stays as it is, with all its parameters, buffers and modes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Beside", "Joined", "Outputs", "WithoutContext"]


class Outputs(nn.Module):
    """(p, context) → (u, t), or t alone, of network(p, context) → (B, 2T or T, …): what an `AffineCoupling` asks for.

    Args:
        network: given p and the context.
        layout: order of its output channels: "ut" [u | t], "tu" [t | u], "tutu" t₀, u₀, t₁, u₁, …, or "t": t alone.
        factor_u, factor_t: what the library multiplies them by.
    """

    def __init__(self, network: nn.Module, layout: str, factor_u: float = 1.0, factor_t: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.layout = layout
        self.factor_u, self.factor_t = factor_u, factor_t

    def forward(self, p: Tensor, context: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(B, P, …) → u, t (B, T, …) each."""
        raw = self.network(p, context)
        factor_u, factor_t = self.factor_u, self.factor_t
        if factor_u == factor_t or self.layout == "t":  # in one pass
            raw, factor_u, factor_t = _times(raw, factor_t), 1.0, 1.0
        if self.layout == "t":
            return raw
        if self.layout == "tutu":
            t, u = raw.unflatten(1, (-1, 2)).unbind(2)
        elif self.layout == "tu":
            t, u = raw.chunk(2, 1)
        else:
            u, t = raw.chunk(2, 1)
        return _times(u, factor_u), _times(t, factor_t)

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"{self.layout}, factor_u={self.factor_u:g}, factor_t={self.factor_t:g}"


class WithoutContext(nn.Module):
    """A network that is given p alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, p: Tensor, context: Tensor | None = None) -> Tensor:
        """network(p)."""
        return self.network(p)


class Joined(nn.Module):
    """A network that is given the channels of p and of the context: all of those, or `channels` alone."""

    def __init__(self, network: nn.Module, channels: Sequence[int] | None = None) -> None:
        super().__init__()
        self.network = network
        self.channels = None if channels is None else list(channels)

    def forward(self, p: Tensor, context: Tensor | None = None) -> Tensor:
        """network([p, context])."""
        assert context is not None
        given = context if self.channels is None else context[:, self.channels]
        return self.network(torch.cat([p, given], 1))


class Beside(nn.Module):
    """Two networks on the same input, with their output channels one behind the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, p: Tensor, context: Tensor | None = None) -> Tensor:
        """[first(p, context) | second(p, context)]."""
        return torch.cat([self.first(p, context), self.second(p, context)], 1)


def _times(x: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return x
    return -x if factor == -1 else factor * x
