"""A library as the benchmarks see it, and the networks that all libraries' flows have in common."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Density", "Library", "NetOfBoth", "convolutions", "mlp", "standard_normal"]


class Density(NamedTuple):
    """A flow: log p(x | context) of rows, and n samples given a context of as many rows."""

    module: nn.Module
    log_prob: Callable[[Tensor, Tensor | None], Tensor]
    sample: Callable[[int, Tensor | None], Tensor]


@dataclass(frozen=True)
class Library:
    """Its flow at the size of a `FlowCase`, and kinds of its layers, each as a flow, for vectors and for images.

    Makers import the library when they are called.
    """

    name: str
    flow: Callable[[Any, str], Density]  # case, device
    kinds: Mapping[str, Callable[[Any], Density]]
    image_kinds: Mapping[str, Callable[[Any], Density]] = field(default_factory=dict)
    refuses: Callable[[Any], str] = lambda case: ""  # why it has no flow of a `FlowCase`, or ""

    def why_not(self, case: Any = None) -> str:
        """Why it, or its flow of a `FlowCase`, cannot be measured, or ""."""
        if importlib.util.find_spec(self.name) is None:
            return f"{self.name} is not installed (glf_fast[bench] has it)"
        return self.refuses(case) if case else ""


def mlp(widths: Sequence[int], *, zero_last: bool = False) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    if zero_last:
        nn.init.zeros_(layers[-2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(layers[-2].bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


class NetOfBoth(nn.Module):
    """A coupling's network as nflows and normflows call it, with the context beside its input.

    By the root of `hidden_features` they divide what becomes widths and heights of splines.
    """

    def __init__(self, layers: nn.Module, hidden_features: int) -> None:
        super().__init__()
        self.layers = layers
        self.hidden_features = hidden_features

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Its output, from x and the context together."""
        return self.layers(x if context is None else torch.cat([x, context], 1))


def convolutions(n_in: int, n_out: int, width: int) -> nn.Sequential:
    """Glow's network: 3 × 3, 1 × 1 and 3 × 3."""
    return nn.Sequential(
        nn.Conv2d(n_in, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
        nn.Conv2d(width, n_out, 3, padding=1),
    )


def standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1) of each row."""
    return -0.5 * (z.square().flatten(1).sum(1) + z.shape[1:].numel() * math.log(2 * math.pi))
