"""The conditioners of a coupling flow: a multi-layer perceptron whose last layer starts at zero, or two of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from glf_fast.ops.checks import check_activation, check_dropout
from glf_fast.reference import ACTIVATIONS

__all__ = ["ACTIVATION_MODULES", "MLP", "SeparateNetworks", "activation_module"]

ACTIVATION_MODULES: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
}
assert ACTIVATION_MODULES.keys() == ACTIVATIONS.keys()


def activation_module(name: str, constant: float | None) -> nn.Module:
    """The activation of this name; `constant` None is its default."""
    check_activation(name, constant)
    return ACTIVATION_MODULES[name](*(() if constant is None else (constant,)))


class MLP(nn.Sequential):
    """Linear → activation → … → Linear, (B, in_features) → (B, out_features).

    The last layer starts at zero, so that a coupling starts as the identity (Glow, arXiv:1807.03039, section 3.3).

    Args:
        hidden: widths of zero to eight hidden layers.
        activation: relu, leaky_relu, silu, gelu, tanh, elu, selu, hardswish, softplus or mish.
        activation_constant: the slope of leaky_relu below 0, or α of elu; None is PyTorch's default.
        dropout: probability of an `nn.Dropout` behind every activation; 0 for none.
    """

    # Of networks that were pickled before there were any.
    dropout = 0.0
    activation_constant: float | None = None

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        activation: str = "relu",
        activation_constant: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        check_activation(activation, activation_constant)
        check_dropout(dropout)
        if len(hidden) > 8 or any(width < 1 for width in hidden):
            raise ValueError(f"hidden must be zero to eight widths ≥ 1; got {tuple(hidden)}")
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise([in_features, *hidden]):
            layers += [nn.Linear(n_in, n_out), activation_module(activation, activation_constant)]
            layers += [nn.Dropout(float(dropout))] if dropout else []
        last = nn.Linear(hidden[-1] if hidden else in_features, out_features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)
        self.activation = activation
        self.activation_constant = ACTIVATIONS[activation] if activation_constant is None else activation_constant
        self.dropout = float(dropout)

    def linears(self) -> list[nn.Linear]:
        """The linear layers, first to last."""
        return [layer for layer in self if isinstance(layer, nn.Linear)]


class SeparateNetworks(nn.Module):
    """h → [u(h), t(h)]: one network for the raw log-scale, one for the shift, as in RealNVP (arXiv:1605.08803).

    Args:
        u, t: from (B, P + C, …) to (B, T, …).
    """

    def __init__(self, u: nn.Module, t: nn.Module) -> None:
        super().__init__()
        self.u = u
        self.t = t

    def forward(self, h: Tensor) -> Tensor:
        """[u, t] (B, 2·T, …)."""
        return torch.cat([self.u(h), self.t(h)], 1)
