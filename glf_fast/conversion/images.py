"""Layers on the channels of images → flow layers. Networks stay the library's; what is affine between them becomes little."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from glf_fast.conversion.gaps import Affine, fold
from glf_fast.conversion.layers import NetworkCoupling, Permutation, Piece, width
from glf_fast.conversion.stack import Sources, standalone
from glf_fast.flow import AffineCoupling, FixedLinear
from glf_fast.flow.sequential import run_layers

__all__ = ["OnChannels", "Outputs", "Reshaped", "on_channels"]


def on_channels(layers: Iterable[NetworkCoupling | Piece], sources: Sources) -> list[nn.Module]:
    """The layers, first to last, in float64; what is trained of their affine maps is added to `sources`.

    A coupling wants its channels in two pieces, passive and transformed, in any order of the two: where they are not,
    the permutation goes into the affine maps on both sides.
    """
    modules: list[nn.Module] = []
    gap: list[Piece] = []
    for layer in layers:
        if not isinstance(layer, NetworkCoupling):
            gap.append(layer)
            continue
        orders = torch.cat([layer.passive, layer.transformed]), torch.cat([layer.transformed, layer.passive])
        ways = [fold([*gap, Permutation(order)], width(layer)) for order in orders]
        flip = _keeps_places(ways[1][-1]) and not _keeps_places(ways[0][-1])
        modules += [module for affine in ways[flip] for module in _modules(affine, sources)]
        modules.append(_coupling(layer, flip))
        gap = [Permutation(orders[flip].argsort())]
    if gap:
        modules += [module for affine in fold(gap, width(gap[0])) for module in _modules(affine, sources)]
    return modules


def _coupling(layer: NetworkCoupling, flip: bool) -> AffineCoupling:
    """Of the last channels given the first, or if `flip` of the first given the last."""
    P, T = len(layer.passive), len(layer.transformed)
    return AffineCoupling(
        P + T, layer.network, additive=isinstance(layer.network, Outputs) and layer.network.layout == "t",
        log_scale=layer.log_scale, log_scale_constant=layer.log_scale_constant, add_first=layer.add_first,
        mask=[True] * T + [False] * P if flip else [False] * P + [True] * T, undo=layer.undo, pass_context=True,
    )  # fmt: skip


def _keeps_places(affine: Affine) -> bool:
    """Whether every channel stays in its place."""
    return affine.W is None and torch.equal(affine.order, torch.arange(len(affine.order), device=affine.order.device))


def _modules(affine: Affine, sources: Sources) -> list[nn.Module]:
    """[ActNorm,] [InvertibleLinear or FixedLinear]."""
    if affine.W is None or affine.W_trained:
        return standalone(affine, sources)
    order = torch.arange(len(affine.W), device=affine.W.device)
    return [*standalone(replace(affine, W=None, order=order), sources), FixedLinear(affine.W.detach())]


class Outputs(nn.Module):
    """(p, context) → (u, t), or t alone, of networks of the library: what an `AffineCoupling` asks for.

    The networks stay as they are, with all their parameters, buffers and modes.

    Args:
        networks: one, or one for u and one for t; from (B, P + …, …) to (B, 2T or T, …).
        layout: order of one's output channels: "ut" [u | t], "tu" [t | u], "tutu" t₀, u₀, t₁, u₁, …, or "t": t alone.
        factor_u, factor_t: what the library multiplies them by.
        context: they are given p and the context as an "argument", p alone ("none"), or p and these channels of the
            context in one input.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        layout: str,
        factor_u: float = 1.0,
        factor_t: float = 1.0,
        context: str | slice | list[int] = "argument",
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.layout = layout
        self.factor_u, self.factor_t = factor_u, factor_t
        self.context = context

    def forward(self, p: Tensor, context: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(B, P, …) → u, t (B, T, …) each."""
        given: tuple[Tensor | None, ...] = (p,)
        if self.context == "argument":
            given = p, context
        elif not isinstance(self.context, str):
            assert context is not None
            given = (torch.cat([p, context[:, self.context]], 1),)
        raw, *second = (network(*given) for network in self.networks)
        factor_u, factor_t = self.factor_u, self.factor_t
        if second:
            return _times(raw, factor_u), _times(second[0], factor_t)
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


def _times(x: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return x
    return -x if factor == -1 else factor * x


class OnChannels(nn.Module):
    """A `SequentialFlow` in a library's flow: of any number of pixels, with a context of any kind for all layers."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, C, …) → z like x, logdet (B,)."""
        return run_layers(self.layers, x, context, [], inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, C, …) → x like z, logdet (B,)."""
        return run_layers(self.layers, z, context, [], inverse=True)


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
