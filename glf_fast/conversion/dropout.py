"""Dropout in the networks of other libraries: where a fused network has it, and where it would be lost."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx

from glf_fast.conversion.layers import NamedActivation, Unfusable

__all__ = ["Dropped", "behind_activation", "dropouts_of", "functional_dropout", "lost"]


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


def lost(steps: Iterable[object]) -> float:
    """The largest p of dropouts that the fused network will not have, or 0; raises Unfusable where one of them is active."""
    dropouts = [step for step in steps if isinstance(step, Dropped)]
    if active := [step.p for step in dropouts if step.active]:
        raise Unfusable(f"dropout (p = {active[0]:g}) is active; convert the flow in eval mode")
    return max((step.p for step in dropouts), default=0.0)


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
