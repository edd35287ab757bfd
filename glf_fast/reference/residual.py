"""The coupling's conditioner: a residual network on row vectors, with the context as a gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glf_fast.reference.dropout import Dropout
from glf_fast.reference.mlp import activation_of

__all__ = ["layers_of_block", "residual"]


def residual(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    activation: str = "relu",
    activation_constant: float | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """h ← h W₀ + b₀; for every block h ← h + (a(a(h) W₁ + b₁) W₂ + b₂) ⊙ σ(context Wc + bc); then h Wf + bf.

    The `ResidualNet` of nflows, after "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027). The gate σ(…) is there
    with a context only, which is also in the last columns of h.

    `h` (B, P + C); `context` (B, C) or None. `weights`: W₀ (P + C, H), for each block W₁ (H, H), W₂ (H, H) and with a context
    Wc (C, H), then Wf (H, n); `biases` alike, (H) and (n). Returns (B, n).

    `dropout` acts behind the second activation of each block, whose number is its layer.
    """
    act = activation_of(activation, activation_constant)
    (W, *inner, W_last), (b, *inner_biases, b_last) = weights, biases
    h = h @ W + b
    size = layers_of_block(context)
    for block, i in enumerate(range(0, len(inner), size)):
        (W_1, W_2, *gate), (b_1, b_2, *gate_bias) = inner[i : i + size], inner_biases[i : i + size]
        hidden = act(act(h) @ W_1 + b_1)
        if dropout is not None:
            hidden = dropout(hidden, block)
        branch = hidden @ W_2 + b_2
        h = h + (branch * torch.sigmoid(context @ gate[0] + gate_bias[0]) if context is not None and gate else branch)
    return h @ W_last + b_last


def layers_of_block(context: Tensor | None) -> int:
    """Linear layers of a block: two, and one of the gate if the context has columns."""
    return 3 if context is not None and context.shape[1] else 2
