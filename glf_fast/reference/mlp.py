"""The coupling's conditioner: a multi-layer perceptron on row vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glf_fast.reference.dropout import Dropout

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_FUNCTIONS",
    "NEED_INPUT",
    "Activation",
    "activation_of",
    "constant_of_activation",
    "mlp",
]


class Activation(NamedTuple):
    """An activation and its one constant, if it has one."""

    function: Callable[..., Tensor]  # a(x) of x and, if it has one, of the constant
    default: float | None = None  # PyTorch's
    # The constant lies between these, where a'(x) is a function of a(x).
    interval: tuple[float, float] = (0.0, math.inf)


# A new function is an entry here, one in flow/mlp.py, in csrc/cpu/flow.h and elementwise.h (record.h, if its slope needs x),
# in kernels/math.py, in csrc/cuda/flow_math.cuh and ops/coupling_flow/small.py, and for other libraries' in
# conversion/activations.py.
ACTIVATION_FUNCTIONS: dict[str, Activation] = {
    "relu": Activation(F.relu),
    "leaky_relu": Activation(F.leaky_relu, 0.01),  # the slope below 0
    "silu": Activation(F.silu),
    "gelu": Activation(F.gelu),  # the exact one (erf)
    "tanh": Activation(F.tanh),
    "elu": Activation(F.elu, 1.0),  # α
    "selu": Activation(F.selu),
    "hardswish": Activation(F.hardswish),
    "softplus": Activation(F.softplus),  # β = 1, linear above 20
    "mish": Activation(F.mish),
}
# name → default of its constant (None: it has none).
ACTIVATIONS: dict[str, float | None] = {name: f.default for name, f in ACTIVATION_FUNCTIONS.items()}
# Those whose a'(x) is no function of a(x): a backward needs x itself, or a'(x).
NEED_INPUT = ("silu", "gelu", "hardswish", "mish")


def activation_of(name: str, constant: float | None = None) -> Callable[[Tensor], Tensor]:
    """The activation of this name as a function of x alone; `constant` None is its default."""
    f = ACTIVATION_FUNCTIONS[name]
    if f.default is None:
        return f.function
    given = f.default if constant is None else constant
    return lambda x: f.function(x, given)


def constant_of_activation(name: str, constant: float | None) -> float:
    """The constant as the function and the kernels take it: 0 where there is none. None is the default."""
    given = ACTIVATIONS[name] if constant is None else constant
    return 0.0 if given is None else float(given)


def mlp(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str = "relu",
    activation_constant: float | None = None,
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
            found.append(mlp(h, [w[n] for w in weights], [b[n] for b in biases], activation, activation_constant, own))
        return torch.cat(found, 1)
    f = ACTIVATION_FUNCTIONS[activation]
    constants = () if f.default is None else (f.default if activation_constant is None else activation_constant,)
    for i, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        h = f.function(h @ weight + bias, *constants)
        if dropout is not None:
            h = dropout(h, i)
    return h @ weights[-1] + biases[-1]
