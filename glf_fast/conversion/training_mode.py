"""Dropout and batch norm in networks of other libraries: what a fused network has of them, and what it would lose.

Batch norm in eval mode is folded into the linear layer before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from glf_fast.conversion.layers import NamedActivation, Unfusable, check_once, trained_together

__all__ = [
    "BATCH_NORM", "Dropped", "Norm", "batch_norm_step", "behind_activation", "dropouts_of", "functional_dropout", "lost",
    "without_norms",
]  # fmt: skip


@dataclass(frozen=True)
class Dropped:
    """A step of a network that drops numbers with probability p > 0 in training mode, which it is in or not."""

    p: float
    active: bool


def behind_activation(steps: Sequence[object]) -> list[Dropped]:
    """The dropouts among the steps behind a linear layer that do what they would do behind its activation."""
    # For these a(x·m/(1 − p)) = a(x)·m/(1 − p).
    homogeneous = any(isinstance(step, NamedActivation) and step.name in ("relu", "leaky_relu") for step in steps)
    return [step for i, step in enumerate(steps) if isinstance(step, Dropped) and (i > 0 or homogeneous)]


def dropouts_of(hidden: Sequence[Sequence[object]], steps: Iterable[object], training: bool) -> dict[str, Any]:
    """The dropouts of a network as a `Conditioner` has them: its `dropout` and `active`, or else what is `lost`.

    Args:
        hidden: the dropouts of each hidden layer.
        steps: all steps of the network.
        training: its mode.

    Raises Unfusable where a dropout is active that the fused network will not have.
    """
    every = [step for step in steps if isinstance(step, Dropped)]
    alike = len(set(every)) == 1 and len(every) == len(hidden) and all(len(layer) == 1 for layer in hidden)
    if alike and every[0].p < 1 and every[0].active == training:
        return {"dropout": every[0].p, "active": training}
    return {"lost": lost(every)}


def lost(steps: Iterable[object]) -> frozenset[str]:
    """The dropouts that the fused network will not have, in words, by the largest p; raises Unfusable if one is active."""
    dropouts = [step for step in steps if isinstance(step, Dropped)]
    if active := [step.p for step in dropouts if step.active]:
        raise Unfusable(f"dropout (p = {active[0]:g}) is active; convert the flow in eval mode")
    return frozenset({f"Dropout (p = {max(step.p for step in dropouts):g})"} if dropouts else ())


def functional_dropout(node: fx.Node, other: fx.Graph | None) -> Iterator[Dropped]:
    """The step of a call of `F.dropout`, given the graph in the other mode, of the same nodes; none where it never drops.

    Raises Unfusable for one that always does.
    """
    calls = [node, *(call for call in (other.nodes if other else ()) if call.name == node.name)]
    p, modes = 0.0, []
    for call in calls:
        given = inspect.signature(F.dropout).bind(*call.args, **call.kwargs)
        given.apply_defaults()
        p = float(given.arguments["p"])
        modes.append(bool(given.arguments["training"]))
    if p and all(modes):
        raise Unfusable(f"its dropout (p = {p:g}) is active in every mode")
    if p and any(modes):
        yield Dropped(p, modes[0])


BATCH_NORM = frozenset({"BatchNorm"})  # what a layer has lost whose running statistics are folded into others


@dataclass(frozen=True)
class Norm:
    """A step of a network: batch norm in eval mode, x·gain + shift of its units, with the `parameters` that it has."""

    gain: Tensor
    shift: Tensor
    parameters: tuple[Tensor, ...]


def batch_norm_step(module: nn.BatchNorm1d) -> Norm:
    """The step of a batch norm in eval mode; raises Unfusable where it takes the statistics of each batch."""
    if module.training or module.running_mean is None or module.running_var is None:
        raise Unfusable("batch norm takes the statistics of each batch; in eval mode, with running ones, it is fused")
    gain = (module.running_var + module.eps).rsqrt()
    if not module.affine:
        return Norm(gain, -module.running_mean * gain, ())
    gain = module.weight * gain
    return Norm(gain, module.bias - module.running_mean * gain, (module.weight, module.bias))


def without_norms(name: str, steps: Sequence[Any]) -> list[Any]:
    """The steps with batch norms as factors and shifts of the linear layers before them; raises Unfusable."""
    if not any(isinstance(step, Norm) for step in steps):
        return list(steps)
    check_once(
        name, [step if isinstance(step, tuple) else step.parameters for step in steps if isinstance(step, tuple | Norm)]
    )
    folded: list[Any] = []
    for step in steps:
        if not isinstance(step, Norm):
            folded.append(step)
            continue
        linear = folded[-1] if folded else None  # dropout before the norm would not drop the same behind it
        if not isinstance(linear, tuple):
            raise Unfusable(f"{name} has batch norm that follows no linear layer")
        W, b = linear
        trained_together(*(p for p in (W, b, *step.parameters) if p is not None))
        folded[-1] = (W * step.gain.unsqueeze(-1), step.shift if b is None else b * step.gain + step.shift)
    return folded
