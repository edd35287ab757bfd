"""The conditioner of a coupling flow as a residual network, with the context as a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glf_fast.flow.mlp import activation_module
from glf_fast.ops.checks import check_activation, check_dropout
from glf_fast.reference import ACTIVATIONS

__all__ = ["ResidualNet"]


class ResidualBlock(nn.Module):
    """h → h + L₂(a(L₁(a(h)))) ⊙ σ(L_c(context)), (B, width) → (B, width); no gate σ(…) without a context.

    Args:
        context_dim: columns of the context, or 0.
        dropout: probability with which numbers before L₂ are dropped in training mode.
    """

    dropout = 0.0  # of blocks that were pickled before there was any

    def __init__(
        self,
        width: int,
        context_dim: int = 0,
        *,
        activation: str = "relu",
        activation_constant: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation_module(activation, activation_constant)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.gate = nn.Linear(context_dim, width) if context_dim else None
        self.dropout = float(dropout)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """h (B, width) → (B, width)."""
        hidden = self.activation(self.first(self.activation(h)))
        branch = self.second(F.dropout(hidden, self.dropout, self.training))
        return h + (branch if self.gate is None else branch * torch.sigmoid(self.gate(context)))

    def linears(self) -> list[nn.Linear]:
        """The linear layers, the gate's last."""
        return [self.first, self.second] + ([] if self.gate is None else [self.gate])


class ResidualNet(nn.Module):
    """Linear → residual blocks → Linear, (B, in_features) → (B, out_features): the conditioner that nflows has as default.

    The context enters the first layer beside the input, and every block as a gate: `glf_fast.reference.residual`. The last
    layer starts at zero, so that a coupling starts as the identity (Glow, arXiv:1807.03039, section 3.3). A coupling calls it
    with `pass_context=True` if it has a context.

    Args:
        hidden: width of each of one to five blocks, all equal.
        context_dim: columns of the context, which are not counted in `in_features`; 0 for none.
        activation: relu, leaky_relu, silu, gelu, tanh, elu, selu, hardswish, softplus or mish.
        activation_constant: the slope of leaky_relu below 0, or α of elu; None is PyTorch's default.
        dropout: probability with which numbers before the second linear layer of each block are dropped in training mode.

    Example:
        >>> coupling = AffineCoupling(6, ResidualNet(3, [32, 32], 6, context_dim=2), pass_context=True)
        >>> z, logdet = coupling(torch.zeros(4, 6), torch.zeros(4, 2))
        >>> z.shape, logdet.shape
        (torch.Size([4, 6]), torch.Size([4]))
    """

    dropout = 0.0  # as in `ResidualBlock`
    activation_constant: float | None = None

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        context_dim: int = 0,
        activation: str = "relu",
        activation_constant: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_activation(activation, activation_constant)
        check_dropout(dropout)
        if not 1 <= len(hidden) <= 5 or min(hidden) < 1 or len(set(hidden)) > 1:
            raise ValueError(
                f"hidden of a residual network must be one width ≥ 1 for each of one to five blocks; got {tuple(hidden)}"
            )
        width = hidden[0]
        self.first = nn.Linear(in_features + context_dim, width)
        chosen: dict[str, Any] = {
            "activation": activation,
            "activation_constant": activation_constant,
            "dropout": dropout,
        }
        self.blocks = nn.ModuleList(ResidualBlock(width, context_dim, **chosen) for _ in hidden)
        self.last = nn.Linear(width, out_features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.context_dim = context_dim
        self.activation = activation
        self.activation_constant = ACTIVATIONS[activation] if activation_constant is None else activation_constant
        self.dropout = float(dropout)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, in_features) and context (B, context_dim) → (B, out_features)."""
        if (context is None) != (self.context_dim == 0):
            raise ValueError(
                f"context_dim is {self.context_dim}, and {'no' if context is None else 'a'} context was given"
            )
        context = None if context is None else context.to(x.dtype)
        h = self.first(x if context is None else torch.cat([x, context], 1))
        for block in self.blocks:
            h = block(h, context)
        return self.last(h)

    def linears(self) -> list[nn.Linear]:
        """The linear layers in the order of `glf_fast.reference.residual`."""
        inner = [linear for block in self.blocks for linear in block.linears()]  # type: ignore[operator]
        return [self.first, *inner, self.last]
