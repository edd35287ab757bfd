"""Layers with networks that stay the library's → flow layers: on images, and splines on vectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.gaps import Affine, fold
from glf_fast.conversion.layers import Bijection, Coupling, Permutation, Piece, flow_options, width
from glf_fast.conversion.stack import Sources, standalone
from glf_fast.flow import AffineCoupling, FixedLinear, SplineCoupling
from glf_fast.flow.actnorm import find_far
from glf_fast.flow.sequential import run_layers
from glf_fast.reference import Spline

__all__ = ["OnChannels", "Outputs", "Reshaped", "on_channels"]


def on_channels(layers: Iterable[Coupling | Piece], sources: Sources) -> list[nn.Module]:
    """The layers, first to last, in float64; what is trained of their affine maps is added to `sources`.

    A coupling wants its channels in two pieces, passive and transformed, in any order of the two: where they are not,
    the permutation goes into the affine maps on both sides.
    """
    modules: list[nn.Module] = []
    gap: list[Piece] = []
    for layer in layers:
        if not isinstance(layer, Coupling):
            gap.append(layer)
            continue
        orders = torch.cat([layer.passive, layer.transformed]), torch.cat([layer.transformed, layer.passive])
        ways = [fold([*gap, Permutation(order)], width(layer)) for order in orders]
        flip = ways[0][-1].mixes() and not ways[1][-1].mixes()
        modules += _modules(ways[flip], sources)
        modules.append(_coupling(layer, flip))
        gap = [Permutation(orders[flip].argsort())]
    if gap:
        modules += _modules(fold(gap, width(gap[0])), sources)
    return modules


def _coupling(layer: Coupling, flip: bool) -> AffineCoupling | SplineCoupling:
    """The coupling of the last channels given the first, or if `flip` of the first given the last."""
    P, T = len(layer.passive), len(layer.transformed)
    mask = [True] * T + [False] * P if flip else [False] * P + [True] * T
    options: dict[str, Any] = {"mask": mask, "undo": layer.undo, "pass_context": True}
    if isinstance(layer.univariate, Spline):
        return SplineCoupling(P + T, layer.conditioner, spline=layer.univariate, **options)
    options |= {"additive": layer.conditioner.layout == "t", "add_first": layer.add_first}
    return AffineCoupling(P + T, layer.conditioner, **flow_options(layer.univariate), **options)


def _modules(maps: Iterable[Affine], sources: Sources) -> list[nn.Module]:
    """[ActNorm,] [InvertibleLinear or FixedLinear] of each map."""
    modules: list[nn.Module] = []
    for affine in maps:
        if affine.W is None or affine.W_trained:
            modules += standalone([affine], sources)
        else:
            scale = replace(affine, W=None, order=torch.arange(len(affine.W), device=affine.W.device))
            modules += [*standalone([scale], sources), FixedLinear(affine.W.detach())]
    return modules


class Outputs(nn.Module):
    """(p, context) → (u, t), t alone, or splines' parameters, by networks of the library, as the conditioner of a coupling.

    The networks stay as they are, with all their parameters, buffers and modes.

    Args:
        networks: one, or one for u and one for t; from (B, P + …, …) to (B, 2T, T or n·T, …).
        layout, factor_u, factor_t: as in `DeclaredCoupling`.
        context: as there; an index of channels of the context, which are given in one input behind p.
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
        elif not isinstance(self.context, str) and context is not None:
            given = (torch.cat([p, context[:, self.context]], 1),)
        raw, *second = (network(*given) for network in self.networks)
        factor_u, factor_t = self.factor_u, self.factor_t
        if second:
            return _times(raw, factor_u), _times(second[0], factor_t)
        if self.layout == "spline":
            return raw
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


class OnChannels(Bijection):
    """A `SequentialFlow` in a library's flow: of any number of pixels, with a context of any kind for all layers."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def train(self, mode: bool = True) -> OnChannels:
        """Set the mode, and find anew which ActNorms are not folded into matrices because they move data far."""
        super().train(mode)
        find_far(self.layers)
        return self

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return run_layers(self.layers, x, context, [], inverse=inverse)


class Reshaped(Bijection):
    """Noise (B, *noise) as (B, *event_shape): a squeezed image, or a vector, with the shape of the data."""

    def __init__(self, noise: tuple[int, ...], event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.noise, self.event_shape = noise, event_shape

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return x.reshape(-1, *(self.noise if inverse else self.event_shape)), x.new_zeros(len(x))
