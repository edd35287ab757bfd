"""Autoregressive layers with nflows' network MADE: those of nflows, of normflows, which has a copy of it, and of sbi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.activations import named_activation, one_activation
from glf_fast.conversion.autoregressive import DeclaredAutoregressive, masked_linear
from glf_fast.conversion.chains import Part
from glf_fast.conversion.dropout import lost
from glf_fast.conversion.layers import Layer, Unfusable
from glf_fast.conversion.mlp import check_class, is_class, network_steps
from glf_fast.reference import Spline, log_scale

__all__ = ["affine_autoregressive", "spline_autoregressive"]


def affine_autoregressive(part: Part, *, undo: bool = False) -> list[Layer]:
    """A `MaskedAffineAutoregressiveTransform`; `undo` where the library calls its forward noise → data."""
    name, constant = _read_log_scale(part.module, part.shape[0])
    return [_read(part, part.module.autoregressive_net, 2, log_scale=name, constant=constant, undo=undo)]


def spline_autoregressive(part: Part, transform: Any) -> list[Layer]:
    """A `MaskedPiecewiseRationalQuadraticAutoregressiveTransform`."""
    network, bound = transform.autoregressive_net, transform.tail_bound
    if transform.tails != "linear" or isinstance(bound, Tensor):
        raise Unfusable(f"tails {transform.tails!r} of bound {bound}: linear tails of one bound are covered")
    scale = network.hidden_features**-0.5 if hasattr(network, "hidden_features") else 1.0
    kind = Spline(
        transform.num_bins, -float(bound), float(bound), transform.tails, "nflows",
        transform.min_bin_width, transform.min_bin_height, transform.min_derivative, scale,
    )  # fmt: skip
    return [_read(part, network, kind.columns, spline=kind)]


def _read_log_scale(transform: Any, dim: int) -> tuple[str, float]:
    """Name and constant of what the object makes of u, log(softplus(u) + ε) or log(σ(u + 2) + ε): releases differ."""
    u = torch.linspace(-40, 40, 161, dtype=torch.float64)
    numbers = torch.stack([u, torch.zeros_like(u)], 1).repeat(1, dim)
    found = transform._elementwise_forward(u.new_zeros(len(u), dim), numbers)[1] / dim
    for name, constant in (("softplus", 1e-3), ("nflows", 1e-3), ("softplus", float(found[0].exp()))):
        if torch.allclose(found, log_scale(u, name, constant), rtol=1e-12, atol=1e-12):
            return name, constant
    raise Unfusable("its scale is neither softplus(u) + ε nor σ(u + 2) + ε")


def _read(part: Part, network: Any, columns: int, **options: Any) -> Layer:
    """The layer of this network, with so many numbers for each feature side by side."""
    check_class(network, "MADE")
    for block in network.blocks:
        check_class(block, "MaskedResidualBlock" if hasattr(block, "linear_layers") else "MaskedFeedforwardBlock")
    for module in (network, *network.blocks):
        if (layer := getattr(module, "context_layer", None)) is not None:
            check_class(layer, "Linear")
    if type(getattr(network, "preprocessing", None)) not in (type(None), nn.Identity):
        raise Unfusable("its network is given functions of the features, such as sines")
    blocks = list(network.blocks)
    residual = getattr(network, "use_residual_blocks", True)
    own = is_class(network, "nflows.transforms.made.MADE")
    if residual and not (blocks and all(hasattr(block, "linear_layers") for block in blocks)):
        raise Unfusable("its network has no activation behind the first layer")
    if any(getattr(block, "use_batch_norm", False) or getattr(block, "batch_norm", None) for block in blocks):
        raise Unfusable("a masked network with batch norm is not covered")
    if residual and not own and hasattr(network, "context_layer"):
        raise Unfusable("the context gates the blocks of its masked network")
    activations = [named_activation(module.activation) for module in (*([] if residual else [network]), *blocks)]
    linears = [network.initial_layer]
    for block in blocks:
        linears += block.linear_layers if residual else [block.linear]
    return DeclaredAutoregressive(
        linears=[masked_linear(linear) for linear in (*linears, network.final_layer)],
        outputs=torch.arange(part.shape[0] * columns).view(-1, columns),
        activation=one_activation("its network", activations),
        network="residual" if residual else "mlp",
        context_layer=getattr(network, "context_layer", None),
        block_contexts=[block.context_layer for block in blocks if hasattr(block, "context_layer")],
        lost=lost(step for block in blocks for step in network_steps(block.dropout)),
        **options,
    ).read()
