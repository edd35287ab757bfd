"""Layers on the channels of images → flow layers, with as few affine ones between two couplings as train what was trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from glf_fast.conversion.gaps import Affine, fold
from glf_fast.conversion.images.networks import Outputs
from glf_fast.conversion.layers import Dense, Diagonal, NetworkCoupling, Permutation, width
from glf_fast.conversion.stack import Sources, standalone
from glf_fast.flow import AffineCoupling, FixedLinear

__all__ = ["on_channels"]

Piece = Permutation | Diagonal | Dense

_LIKE = torch.empty(0, dtype=torch.float64, device="cpu")  # where flows are converted


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
        ways = [fold([*gap, Permutation(order)], width(layer), _LIKE) for order in orders]
        flip = _stays(ways[1][-1]) and not _stays(ways[0][-1])
        modules += [module for affine in ways[flip] for module in _modules(affine, sources)]
        modules.append(_coupling(layer, flip))
        gap = [Permutation(orders[flip].argsort())]
    if gap:
        modules += [module for affine in fold(gap, width(gap[0]), _LIKE) for module in _modules(affine, sources)]
    return modules


def _coupling(layer: NetworkCoupling, flip: bool) -> AffineCoupling:
    """Of the last channels given the first, or if `flip` of the first given the last."""
    P, T = len(layer.passive), len(layer.transformed)
    return AffineCoupling(
        P + T, layer.network, additive=isinstance(layer.network, Outputs) and layer.network.layout == "t",
        log_scale=layer.log_scale, log_scale_constant=layer.log_scale_constant, add_first=layer.add_first,
        mask=[True] * T + [False] * P if flip else [False] * P + [True] * T, undo=layer.undo, pass_context=True,
    )  # fmt: skip


def _stays(affine: Affine) -> bool:
    """Whether every channel stays in its place."""
    return affine.W is None and torch.equal(affine.order, torch.arange(len(affine.order), device=affine.order.device))


def _modules(affine: Affine, sources: Sources) -> list[nn.Module]:
    """[ActNorm,] [InvertibleLinear or FixedLinear]."""
    if affine.W is None or affine.W_trained:
        return standalone(affine, sources)
    still = torch.arange(len(affine.W), device=affine.W.device)
    return [*standalone(replace(affine, W=None, order=still), sources), FixedLinear(affine.W.detach())]
