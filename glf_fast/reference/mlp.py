"""The coupling's conditioner: a multi-layer perceptron on row vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glf_fast.reference.dropout import Dropout

__all__ = ["ACTIVATIONS", "mlp"]

# PyTorch's defaults: leaky_relu has slope 0.01, gelu is the exact one (erf), elu has α = 1.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": F.tanh,
    "elu": F.elu,
    "selu": F.selu,
}


def mlp(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str = "relu",
    dropout: Dropout | None = None,
) -> Tensor:
    """h ← a(h Wᵢ + bᵢ) for every layer but the last, which is linear.

    `h` (B, n₀); `weights[i]` (nᵢ, nᵢ₊₁), multiplied from the right; `biases[i]` (nᵢ₊₁). Returns (B, n_last).
    Stacks of N networks, (N, nᵢ, nᵢ₊₁) and (N, nᵢ₊₁), are applied to the same h, and (B, N·n_last) is returned.
    `dropout` acts behind every activation.
    """
    if weights[0].ndim == 3:
        networks = range(len(weights[0]))
        found = []
        for n in networks:
            own = dropout and dropout._replace(network=n)
            found.append(mlp(h, [w[n] for w in weights], [b[n] for b in biases], activation, own))
        return torch.cat(found, 1)
    act = ACTIVATIONS[activation]
    for i, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        h = act(h @ weight + bias)
        if dropout is not None:
            h = dropout(h, i)
    return h @ weights[-1] + biases[-1]
