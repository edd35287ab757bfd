"""Layers on the channels of images → modules: all that is affine between two couplings becomes one product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from glf_fast.conversion.gaps import REACH, Affine, fold
from glf_fast.conversion.images.modules import ChannelCoupling, ChannelMap, FixedLinear, OnChannels
from glf_fast.conversion.layers import Dense, Diagonal, NetworkCoupling, Permutation, width
from glf_fast.conversion.stack import Sources, standalone
from glf_fast.flow import ActNorm, InvertibleLinear

__all__ = ["on_channels"]

Piece = Permutation | Diagonal | Dense

_LIKE = torch.empty(0, dtype=torch.float64, device="cpu")  # where flows are converted


def on_channels(layers: Iterable[NetworkCoupling | Piece], sources: Sources) -> OnChannels:
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
        modules += _modules(ways[flip], sources)
        modules.append(_coupling(layer, flip))
        gap = [Permutation(orders[flip].argsort())]
    if gap:
        modules += _modules(fold(gap, width(gap[0]), _LIKE), sources)
    return OnChannels(modules)


def _coupling(layer: NetworkCoupling, flip: bool) -> ChannelCoupling:
    return ChannelCoupling(
        layer.network, len(layer.passive), len(layer.transformed), log_scale=layer.log_scale,
        log_scale_constant=layer.log_scale_constant, add_first=layer.add_first, undo=layer.undo, flip=flip,
    )  # fmt: skip


def _stays(affine: Affine) -> bool:
    """Whether every channel stays in its place."""
    return affine.W is None and torch.equal(affine.order, torch.arange(len(affine.order), device=affine.order.device))


def _modules(maps: Sequence[Affine], sources: Sources) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for affine in maps:
        parts = standalone(affine, sources) if affine.W is None or affine.W_trained else _with_fixed(affine, sources)
        match parts:
            case [ActNorm() as actnorm, InvertibleLinear() | FixedLinear() as linear] if (
                affine.W is not None and affine.reach() <= REACH
            ):
                modules.append(ChannelMap(actnorm, linear))
            case _:
                modules += parts
    return modules


def _with_fixed(affine: Affine, sources: Sources) -> list[nn.Module]:
    """[ActNorm,] and a matrix that is not trained."""
    assert affine.W is not None
    still = torch.arange(len(affine.W), device=affine.W.device)
    return [*standalone(replace(affine, W=None, order=still), sources), FixedLinear(affine.W.detach())]
