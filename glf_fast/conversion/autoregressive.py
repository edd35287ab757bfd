"""The declaration of a masked autoregressive layer, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glf_fast.conversion.degrees import degrees
from glf_fast.conversion.layers import FIXED, Autoregressive, Conditioner, NamedActivation, Unfusable
from glf_fast.conversion.mlp import check_class, role_of
from glf_fast.ops.checks import check_spline
from glf_fast.reference import Spline
from glf_fast.reference.made import fan_in, masks

__all__ = ["DeclaredAutoregressive", "MaskedLinear", "masked_linear"]


class MaskedLinear(NamedTuple):
    """x ↦ x (W ⊙ mask)ᵀ + b, the three as a linear layer has them: (out, in), (out, in) of 0 and 1, and (out,) or None."""

    weight: Tensor
    mask: Tensor
    bias: Tensor | None


def masked_linear(module: nn.Module) -> MaskedLinear:
    """A layer with `weight`, `mask` and `bias`, as all libraries have it; raises Unfusable for one that does something else."""
    check_class(module, "MaskedLinear")
    return MaskedLinear(module.weight, module.mask, module.bias)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DeclaredAutoregressive:
    """x_d ↦ T(x_d; θ_d), whose parameters θ_d a masked network makes of the features before x_d, and of a context.

    The order of the features is read from the masks. T is v·e^ℓ + t with ℓ = f(u), or a spline. A layer to `undo` is one
    whose data → noise is the inverse of all that.
    """

    # In the order of `glf_fast.reference.made`, without those of a context alone. The inputs of the first one are x, then
    # context, or as `features` says.
    linears: Sequence[MaskedLinear]
    outputs: Tensor  # (D, n): the network's output that is each number of θ_d: u and t, or the parameters of a spline
    activation: NamedActivation
    network: str = "mlp"  # as in AutoregressiveFlow
    log_scale: str = "exp"  # f, by the names of `glf_fast.reference.log_scale`
    constant: float | None = None
    spline: Spline | None = None
    undo: bool = False
    features: Tensor | None = None  # the first layer's inputs that are x₀, x₁, …
    # Of a context c: a(c Wᵀ + b) is added to the first layer's output, and c Wᵀ + b to that of each block's first layer.
    context_layer: nn.Linear | None = None
    block_contexts: Sequence[nn.Linear] = ()
    lost: float = 0.0  # p of dropout, which the fused network does not have
    blind: bool = False  # the network is given the context alone: the first layer's weights of x are no parameters

    def read(self) -> Autoregressive:
        """The layer that it is; raises Unfusable."""
        if self.spline is not None:
            check_spline(self.spline)
        linears, (dim, columns) = self.linears, self.outputs.shape
        self._check(dim, columns)
        features = torch.arange(dim) if self.features is None else self.features.cpu()
        outside = torch.ones(linears[0].weight.shape[1], dtype=torch.bool).index_fill(0, features, False)
        given = outside.nonzero().flatten()  # the first layer's inputs that are the context
        seen = [linear.mask.cpu() != 0 for linear in linears]
        by_feature = seen[-1][self.outputs.cpu().flatten()].unflatten(0, (dim, columns)).any(1)
        blocks = 0 if self.network == "mlp" else (len(linears) - 2) // 2
        masked = [*seen[:-1], by_feature]
        own = degrees([masked[0][:, features], *masked[1:]], blocks)
        orders = [layer.argsort(stable=True) for layer in own]
        ranks = [layer[order].tolist() for layer, order in zip(own, orders, strict=True)]
        inputs = [torch.cat([given, features[orders[0]]]), *orders[1:]]
        results = [*orders[1:], self.outputs.cpu()[orders[0]].flatten()]

        weights, biases, roles, bias_roles = [], [], [], []
        for linear, rows, order in zip(linears, inputs, results, strict=True):
            weights.append(linear.weight[order][:, rows].T)
            roles.append(role_of(linear.weight, weights[-1]))
            biases.append(weights[-1].new_zeros(len(order)) if linear.bias is None else linear.bias[order])
            bias_roles.append(role_of(linear.bias, biases[-1]))
        if self.blind:
            roles[0][len(given) :] = FIXED
        used = masks(weights, biases, torch.tensor(fan_in(ranks[1:], ranks[0])), dim)
        for i, (linear, rows, order) in enumerate(zip(linears, inputs, results, strict=True)):
            frozen = used[i] & (linear.mask[order][:, rows].T == 0)  # the degrees allow them, the mask does not
            weights[i] = weights[i].masked_fill(frozen, 0)
            roles[i] = roles[i].masked_fill(frozen, FIXED)
        C = len(given) if self.context_layer is None else self.context_layer.in_features
        for k in range(blocks if C and self.network == "residual" else 0):
            i, order = 1 + 2 * k, orders[2 + 2 * k]
            W, role = weights[i].new_zeros(C, len(order)), roles[i].new_full((C, len(order)), FIXED)
            if self.block_contexts:
                context = self.block_contexts[k]
                W, biases[i] = context.weight[order].T, biases[i] + context.bias[order]
                role, of_bias = role_of(context.weight, W), role_of(context.bias, biases[i])
                bias_roles[i] = torch.maximum(bias_roles[i], of_bias)  # a sum is trained if one of the two is
            weights[i], roles[i] = torch.cat([W, weights[i]]), torch.cat([role, roles[i]])
        if self.context_layer is not None:
            W, b = self.context_layer.weight[orders[1]].T, self.context_layer.bias[orders[1]]
            weights, biases = [*weights, W], [*biases, b]
            roles = [*roles, role_of(self.context_layer.weight, W)]
            bias_roles = [*bias_roles, role_of(self.context_layer.bias, b)]
        factors = torch.ones_like(biases[len(linears) - 1], requires_grad=False)
        return Autoregressive(
            orders[0],
            Conditioner(weights, biases, roles, bias_roles, factors, self.activation, lost=self.lost, blocks=blocks),
            tuple(map(tuple, ranks)),
            self.log_scale,
            self.constant,
            C,
            self.context_layer is not None,
            self.undo,
            self.spline,
            self.network,
        )

    def _check(self, dim: int, columns: int) -> None:
        """Raise Unfusable for a network that a `glf_fast.AutoregressiveFlow` has not."""
        linears, residual = self.linears, self.network != "mlp"
        inputs, *widths, outputs = [linear.weight.shape[1] for linear in linears] + [len(linears[-1].weight)]
        if [len(linear.weight) for linear in linears] != [*widths, outputs]:
            raise Unfusable("its network has linear layers that do not follow each other")
        if residual and (len(widths) not in (3, 5, 7, 9, 11) or len(set(widths)) > 1):
            raise Unfusable("its residual network is not one to five blocks of two layers of one width")
        if not residual and len(widths) > 8:
            raise Unfusable(f"its network has {len(widths)} hidden layers; zero to eight are covered")
        wanted = 2 if self.spline is None else self.spline.columns
        if columns != wanted or outputs != dim * columns or inputs < dim:
            raise Unfusable(
                f"its network maps {inputs} columns to {outputs} where {dim} or more to {dim * wanted} are meant"
            )
        parameters = [id(t) for weight, _, bias in linears for t in (weight, bias) if t is not None]
        if len(set(parameters)) < len(parameters):
            raise Unfusable(
                "its network uses a linear layer more than once: its copies would not stay equal in training"
            )
        for weight, mask, _ in linears:
            if mask.shape != weight.shape or not bool(((mask == 0) | (mask == 1)).all()):
                raise Unfusable("its masks are not one 0 or 1 for each weight")
