"""Layers → a flow: every run of layers that the kernels cover becomes one CouplingFlow or AutoregressiveFlow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from glf_fast.conversion.gaps import REACH, fold, inverted, split_far_shifts
from glf_fast.conversion.images import on_channels
from glf_fast.conversion.layers import Autoregressive, Coupling, Kept, Layer, Permutation, Piece, Transform, width
from glf_fast.conversion.mlp import scale_outputs
from glf_fast.conversion.padding import divided, only_permutes
from glf_fast.conversion.stack import Sources, Step, stack, standalone
from glf_fast.conversion.stack_autoregressive import stack_autoregressive
from glf_fast.flow import Flow, Inverse, SequentialFlow

__all__ = ["fuse"]

# The log-scales with f(−u) = −f(u).
_ODD = ("atan", "exp", "softclip", "tanh")

# As REACH, but between two transforms, where a layer of its own costs a launch.
_REACH_BETWEEN = 32.0

# Elements of a stacked weight from which a flow ends. An optimizer passes over a parameter a dozen times, and 4 MB stay in a
# last-level cache: torch's Adam takes 148 ms for 24 weights of 1,024 × 1,024, and 306 ms for the same numbers in two (Zen 3).
_STACKED = 1 << 20


@dataclass
class _Segment:
    """Transforms of one kind and of like sizes, each with the affine layers before it, and those after the last."""

    transforms: list[Transform]
    gaps: list[list[Piece]]
    after: list[Piece] = field(default_factory=list)


def fuse(
    layers: Sequence[Layer], event_shape: tuple[int, ...], context_shape: tuple[int, ...] = ()
) -> tuple[Flow, Sources]:
    """The flow, in float64, and where its parameters come from.

    A bare CouplingFlow or AutoregressiveFlow if that is all there is, else a SequentialFlow (or, where splits are uneven or
    directions reversed, the wrapper of one).

    Args:
        layers: first to last, data → noise.
        event_shape: of the data, (D,) or (C, H, W); layers that are kept may change it on the way.
        context_shape: of one context. An MLP takes one of C columns; with P rows instead of P + C it ignores it.
    """
    sources: Sources = []
    modules: list[nn.Module] = []
    for kept, run in groupby(layers, lambda layer: isinstance(layer, Kept)):
        if kept:
            modules += [layer.module for layer in run if isinstance(layer, Kept)]
        else:
            read = [_odd_turned(layer) for layer in run if not isinstance(layer, Kept)]
            for layer_run, mlps in _by_network(read, images=len(event_shape) == 3):
                if not mlps:
                    modules += on_channels(layer_run, sources)
                    continue
                for segment in _segments(layer_run):
                    modules += _build(segment, width(read[0]), sum(context_shape), sources)
    if len(modules) == 1 and isinstance(modules[0], Flow):
        return modules[0], sources
    return SequentialFlow(modules, event_shape, context_shape=context_shape), sources


def _by_network(run: Iterable[Any], *, images: bool) -> list[tuple[list[Any], bool]]:
    """The layers in runs, and of each whether its couplings have MLPs, not the library's own networks.

    Affine layers go with the coupling before them. Where there is no coupling, those on images go with the library's networks.
    """
    runs: list[tuple[list[Any], bool]] = []
    before: list[Any] = []
    for layer in run:
        if not isinstance(layer, Transform):
            (runs[-1][0] if runs else before).append(layer)
        elif runs and runs[-1][1] == layer.is_mlp:
            runs[-1][0].append(layer)
        else:
            runs.append(([*before, layer], layer.is_mlp))
            before = []
    return runs or [(before, not images)]


def _segments(run: Iterable[Transform | Piece]) -> list[_Segment]:
    """Transforms grouped by kind and size; affine layers between two groups go where they fold into a step.

    That is before a coupling, or after one that is undone. Affine layers alone are one segment without any.
    """
    transforms: list[Transform] = []
    gaps: list[list[Piece]] = [[]]  # before each transform, and after the last
    for layer in run:
        if isinstance(layer, Transform):
            transforms.append(layer)
            gaps.append([])
        else:
            gaps[-1].append(layer)
    segments: list[_Segment] = []
    permuted = only_permutes(piece for gap in gaps for piece in gap)
    for _, alike in groupby(transforms, _kind):
        for part in _divided(list(alike), permuted):
            before, gaps = gaps[: len(part)], gaps[len(part) :]
            if segments and segments[-1].transforms[-1].undo:
                segments[-1].after, before[0] = before[0], []
            segments.append(_Segment(part, before))
    segments = segments or [_Segment([], [])]
    segments[-1].after = gaps[0]
    return segments


def _divided(alike: list[Any], permuted: bool) -> list[list[Any]]:
    """Transforms of one kind in runs that padding does not make slow; autoregressive ones of a kind have one size."""
    return divided(alike, permuted) if isinstance(alike[0], Coupling) else [alike]


def _odd_turned(layer: Any) -> Any:
    """A coupling that is undone, with odd f, as one that is not: (v − t)·e^−f(u) has −u, −t and the other order."""
    if not (isinstance(layer, Coupling) and layer.is_mlp and layer.undo and layer.log_scale in _ODD):
        return layer
    if layer.spline is not None:
        return layer
    return replace(layer, conditioner=scale_outputs(layer.conditioner, -1.0), add_first=not layer.add_first, undo=False)


def _kind(transform: Transform) -> tuple[object, ...]:
    """The properties that transforms of one flow have in common."""
    mlp = transform.conditioner
    if isinstance(transform, Autoregressive):
        return (
            "autoregressive", transform.network, mlp.activation, tuple(transform.hidden), transform.log_scale,
            transform.log_scale_constant, transform.context_layer, transform.undo, transform.spline,
        )  # fmt: skip
    return (
        transform.kind(), mlp.network, mlp.activation, mlp.dropout, len(mlp.hidden), transform.log_scale,
        transform.log_scale_constant, transform.add_first, transform.undo, transform.spline,
    )  # fmt: skip


def _build(segment: _Segment, dim: int, context_dim: int, sources: Sources) -> list[nn.Module]:
    modules: list[nn.Module] = []
    if segment.transforms and segment.transforms[0].undo:
        first = fold(segment.gaps[0], dim)
        if any(affine.reach() > REACH for affine in first):
            modules += standalone(first, sources)
            segment = replace(segment, gaps=[[], *segment.gaps[1:]])
        turned = _build(_turned(segment), dim, context_dim, sources)
        flow = turned[0] if len(turned) == 1 else SequentialFlow(turned, (dim,), context_dim)
        assert isinstance(flow, Flow)
        return [*modules, Inverse(flow)]
    steps: list[Step] = []
    for pieces, transform in zip(segment.gaps, segment.transforms, strict=True):
        maps = split_far_shifts(fold(pieces, dim), _REACH_BETWEEN if steps else REACH)
        if len(maps) > 1 or _is_full(steps):
            # All maps but the last are layers of their own, which ends the flow so far.
            if steps:
                flow, restore = _stack(steps, context_dim, sources)
                modules.append(flow)
                maps = split_far_shifts(fold([Permutation(restore), *pieces], dim), REACH)
                steps = []
            modules += standalone(maps[:-1], sources)
        steps.append(Step(maps[-1], transform))
    after = segment.after
    if steps:
        flow, restore = _stack(steps, context_dim, sources)
        modules.append(flow)
        after = [Permutation(restore), *after]
    return modules + standalone(fold(after, dim), sources)


def _is_full(steps: Sequence[Step]) -> bool:
    """Whether the weights of one more step would make a flow's parameters slow to train."""
    return (len(steps) + 1) * max(
        (W.numel() for step in steps for W in step.transform.conditioner.weights), default=0
    ) > _STACKED


def _stack(steps: Sequence[Step], context_dim: int, sources: Sources) -> tuple[Flow, Tensor]:
    """One flow of all steps, see `stack` and `stack_autoregressive`."""
    autoregressive = isinstance(steps[0].transform, Autoregressive)
    return (stack_autoregressive if autoregressive else stack)(steps, context_dim, sources)


def _turned(segment: _Segment) -> _Segment:
    """The inverse of a segment of undone transforms: the same transforms not undone, everything in reverse order."""
    gaps = [[inverted(piece) for piece in reversed(gap)] for gap in reversed([*segment.gaps, segment.after])]
    return _Segment([replace(t, undo=False) for t in reversed(segment.transforms)], gaps[:-1], gaps[-1])
