"""Residual networks of nflows, and of packages with a copy of them, as the weights and biases of one conditioner."""

from __future__ import annotations

from typing import Any

from torch import nn

from glf_fast.conversion.activations import named_activation, one_activation
from glf_fast.conversion.dropout import dropouts_of
from glf_fast.conversion.layers import Conditioner, Unfusable
from glf_fast.conversion.mlp import (
    assemble,
    check_class,
    check_hooks,
    is_class,
    network_steps,
    read_mlp,
)

__all__ = ["read_network"]

# Full names of the class; a copy of the library inside of another package has more in front of them.
_CLASSES = ("nflows.nn.nets.resnet.ResidualNet", "normflows.nets.resnet.ResidualNet")


def read_network(network: nn.Module) -> Conditioner:
    """The MLP or residual network that `network` is, see `read_mlp`; raises Unfusable, with the reason, for anything else."""
    return _read_residual(network) if any(is_class(network, name) for name in _CLASSES) else read_mlp(network)


def _read_residual(network: Any) -> Conditioner:
    blocks = network.blocks
    if not 1 <= len(blocks) <= 5:
        raise Unfusable(f"ResidualNet has {len(blocks)} blocks; one to five are covered")
    if getattr(network, "preprocessing", None) is not None:
        raise Unfusable("ResidualNet with preprocessing is not covered")
    layers, activations, dropouts = [network.initial_layer], [], []
    check_hooks(network)
    for block in blocks:
        check_class(block, "ResidualBlock")
    for block in blocks:
        if block.use_batch_norm:
            raise Unfusable("ResidualNet with batch norm is not covered")
        activations.append(named_activation(block.activation))
        dropouts.append(list(network_steps(block.dropout)))
        layers += [*block.linear_layers, *([block.context_layer] if hasattr(block, "context_layer") else [])]
    activation = one_activation("ResidualNet", activations)
    steps = [step for layer in (*layers, network.final_layer) for step in network_steps(layer)]
    linears = [step for step in steps if isinstance(step, tuple)]
    if len(linears) != len(steps) or len(steps) != len(layers) + 1:
        raise Unfusable("ResidualNet has layers that are not linear")
    found = dropouts_of(dropouts, [step for block in dropouts for step in block], network.training)
    return assemble("ResidualNet", linears, activation, found, len(blocks))
