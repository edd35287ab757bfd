"""Flows of other networks as flows of one network that makes [u, t], which is what the GPU's kernels know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glf_fast.ops.options import Options

__all__ = ["as_one_network", "hidden_widths"]


def as_one_network(
    weights: Sequence[Tensor], biases: Sequence[Tensor], n_v: int, options: Options
) -> tuple[Sequence[Tensor], Sequence[Tensor], Options]:
    """Two networks side by side with zeros between them; an additive coupling's after u = 0, of which e^u makes 1.

    Half of those products are with zeros, which small flows on a GPU do not notice: they wait for launches and latencies.

    Args:
        weights, biases: as `reference.coupling_flow` takes them, differentiable.
        n_v: D//2, columns of v.
    """
    if weights[0].ndim == 4:
        first = weights[0].transpose(1, 2).flatten(2)  # (K, n₀, 2·n₁): both see the same input
        return [first, *map(_block_diagonal, weights[1:])], [bias.flatten(1) for bias in biases], options
    if weights[-1].shape[-1] == n_v:
        weights, biases = [*weights[:-1], F.pad(weights[-1], (n_v, 0))], [*biases[:-1], F.pad(biases[-1], (n_v, 0))]
        return weights, biases, options._replace(log_scale="exp", log_scale_constant=None)
    return weights, biases, options


def hidden_widths(weights: Sequence[Tensor]) -> list[int]:
    """Of the hidden layers of that one network."""
    networks = 2 if weights[0].ndim == 4 else 1
    return [networks * weight.shape[-1] for weight in weights[:-1]]


def _block_diagonal(weight: Tensor) -> Tensor:
    """(K, 2, a, b) → (K, 2·a, 2·b)."""
    n = weight.shape[-1]
    u, t = weight.unbind(1)
    return torch.cat([F.pad(u, (0, n)), F.pad(t, (n, 0))], 1)
