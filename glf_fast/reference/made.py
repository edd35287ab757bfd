"""The conditioner of an autoregressive transform: a masked network on row vectors, whose units are sorted by what they see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glf_fast.reference.mlp import activation_of

__all__ = ["MASKED_NETWORKS", "fan_in", "made", "masks"]

# Kinds of masked network, see `made`.
MASKED_NETWORKS = ("mlp", "residual", "skip")


def made(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    fan_in: Tensor,
    context: Tensor | None = None,
    *,
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    context_layer: bool = False,
) -> Tensor:
    """MADE (Germain et al., arXiv:1502.03509): n numbers for each feature of x, which depend on features before it alone.

        "mlp":       h ← a([c, x] W₀ + b₀);  h ← a(h Wᵢ + bᵢ) for every further hidden layer
        "residual":  h ← [c, x] W₀ + b₀;     h ← h + (a([c, a(h)] W₁ + b₁) W₂ + b₂) for every block, as in nflows
        "skip":      h ← [c, x] W₀ + b₀;     h ← h + (a(h W₁ + b₁) W₂ + b₂) for every block, as in zuko

    then h Wf + bf; an "mlp" without hidden layers is [c, x] W₀ + b₀. Unit j of a layer sees the first `fan_in` units of the
    layer before (the first features, of x), and all of the context c: the weights beyond are not used.

    With `context_layer` the context has a hidden layer of its own instead of the columns in the first layer, and
    a(c Wc + bc) is added to x W₀ + b₀, as in nflows.

    Args:
        x: (B, D). context: (B, C) or None.
        weights, biases: W (rows, columns) and b (columns), of the linear layers in order; with `context_layer` then Wc and bc.
        fan_in: (H₁ + … + D) integers, of the units of each hidden layer and of the features, sorted within each layer.

    Returns:
        (B, n·D): those of the first feature, of the second …
    """
    act = activation_of(activation, activation_constant)
    added: Tensor | float = 0.0
    if context_layer:
        (*weights, W_c), (*biases, b_c) = weights, biases
        if context is not None:
            added = act(context @ W_c + b_c)
    seen = masks(weights, biases, fan_in, x.shape[1])

    def linear(i: int, h: Tensor) -> Tensor:
        W = torch.where(seen[i], weights[i], 0)
        rows = W.shape[0] - h.shape[1]
        out = h @ W[rows:] + biases[i]
        return out + context @ W[:rows] if rows and context is not None else out

    last = len(weights) - 1
    h = linear(0, x) + added
    if not last:
        return h
    if network == "mlp":
        h = act(h)
        for i in range(1, last):
            h = act(linear(i, h))
    else:
        for i in range(1, last, 2):
            h = h + linear(i + 1, act(linear(i, act(h) if network == "residual" else h)))
    return linear(last, h)


def masks(weights: Sequence[Tensor], biases: Sequence[Tensor], fan_in: Tensor, dim: int) -> list[Tensor]:
    """Which weights of each layer are used, (rows, columns); those of a context are."""
    found = []
    n_in = dim
    for weight, bias, seen in zip(
        weights, biases, fan_in.split([*(len(b) for b in biases[: len(weights) - 1]), dim]), strict=False
    ):
        seen = seen.repeat_interleave(len(bias) // len(seen))
        row = torch.arange(weight.shape[0], device=weight.device) - (weight.shape[0] - n_in)
        found.append(row[:, None] < seen)
        n_in = len(bias)
    return found


def fan_in(degrees: Sequence[Sequence[int]], features: Sequence[int]) -> list[int]:
    """How many units each unit sees, from sorted degrees: of the hidden layers, and of the features.

    A hidden unit of degree m sees what has a degree of m or less, and feature d the hidden units of lesser degree than its own.
    """
    found: list[int] = []
    before = features
    for own in degrees:
        found += [sum(m <= degree for m in before) for degree in own]
        before = own
    return found + [sum(m < degree for m in before) for degree in features]
