"""The conditioners of a coupling flow: a multi-layer perceptron whose last layer starts at zero, or two of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glf_fast.ops.checks import check_choice, check_dropout
from glf_fast.reference import ACTIVATIONS

__all__ = ["ACTIVATION_MODULES", "MLP", "SeparateNetworks"]

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "selu": nn.SELU,
}
assert ACTIVATION_MODULES.keys() == ACTIVATIONS.keys()


class MLP(nn.Sequential):
    """Linear → activation → … → Linear, (B, in_features) → (B, out_features).

    The last layer starts at zero, so that a coupling starts as the identity (Glow, arXiv:1807.03039, section 3.3).

    Args:
        hidden: widths of one to four hidden layers.
        activation: relu, leaky_relu, silu, gelu, tanh, elu or selu, with PyTorch's default constants.
        dropout: probability of an `nn.Dropout` behind every activation; 0 for none.
    """

    dropout = 0.0  # of networks that were pickled before there was any

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        check_choice("activation", activation, ACTIVATION_MODULES)
        check_dropout(dropout)
        if not 1 <= len(hidden) <= 4 or min(hidden) < 1:
            raise ValueError(f"hidden must be one to four widths ≥ 1; got {tuple(hidden)}")
        widths = [in_features, *hidden, out_features]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Linear(n_in, n_out), ACTIVATION_MODULES[activation](), *[nn.Dropout(dropout)] * (dropout > 0)]
        end = 3 if dropout else 2  # of the last layer
        super().__init__(*layers[: 1 - end])
        nn.init.zeros_(layers[-end].weight)  # type: ignore[arg-type]
        nn.init.zeros_(layers[-end].bias)  # type: ignore[arg-type]
        self.activation = activation
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
