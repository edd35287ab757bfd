"""Layers of nflows that normflows and others have copies of: couplings of splines, and what has the masked network MADE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.activations import named_activation, one_activation
from glf_fast.conversion.autoregressive import DeclaredAutoregressive, masked_linear
from glf_fast.conversion.chains import Part
from glf_fast.conversion.couplings import DeclaredCoupling
from glf_fast.conversion.layers import Layer, Scale, Unfusable, Univariate, numbers_of
from glf_fast.conversion.log_scales import recognised
from glf_fast.conversion.mlp import check_class, is_class, network_steps
from glf_fast.conversion.training_mode import lost
from glf_fast.reference import Spline

__all__ = ["affine_autoregressive", "columns_of", "spline_autoregressive", "spline_coupling"]


def spline_coupling(part: Part, transform: Any) -> list[Layer]:
    """A `PiecewiseRationalQuadraticCouplingTransform`, and splines that its passive half may have, which depend on nothing."""
    if not isinstance(transform.tails, str) or isinstance(transform.tail_bound, Tensor):
        raise Unfusable(
            f"tails {transform.tails!r} of bound {transform.tail_bound}: one name and one number are covered"
        )
    network = transform.transform_net
    hidden = next(
        (getattr(network, name) for name in ("hidden_features", "hidden_channels") if hasattr(network, name)), 1
    )
    kind = _spline(transform, hidden)
    halves = transform.identity_features, transform.transform_features
    layers: list[Layer] = [DeclaredCoupling(*halves, network, "spline", kind).read(part)]
    if (own := transform.unconditional_transform) is not None:
        if len(part.shape) > 1:
            raise Unfusable("its passive channels are transformed, too")
        given = DeclaredCoupling(*halves[::-1], OwnParameters(own), "spline", kind._replace(scale=1.0))
        layers.append(given.read(part))
    return layers


class OwnParameters(nn.Module):
    """The parameters of splines that depend on nothing, as a network: (B, …) → (B, n·T)."""

    def __init__(self, splines: nn.Module) -> None:
        super().__init__()
        self.splines: Any = splines

    def forward(self, p: Tensor, context: Tensor | None = None) -> Tensor:
        """The same for every row."""
        own = self.splines
        parts = own.unnormalized_widths, own.unnormalized_heights, own.unnormalized_derivatives
        return torch.cat(parts, -1).flatten().expand(len(p), -1)


def _spline(transform: Any, hidden: int) -> Spline:
    """The kind of its splines; the library divides widths and heights by the root of the network's width."""
    bound = float(transform.tail_bound)
    return Spline(
        transform.num_bins, -bound, bound, transform.tails, "nflows",
        transform.min_bin_width, transform.min_bin_height, transform.min_derivative, hidden**-0.5,
    )  # fmt: skip


def affine_autoregressive(part: Part, *, undo: bool = False) -> list[Layer]:
    """A `MaskedAffineAutoregressiveTransform`; `undo` where the library calls its forward noise → data."""
    return [_read(part, part.module.autoregressive_net, _log_scale(part.module, part.shape[0]), undo=undo)]


def spline_autoregressive(part: Part, transform: Any) -> list[Layer]:
    """A `MaskedPiecewiseRationalQuadraticAutoregressiveTransform`."""
    network, bound = transform.autoregressive_net, transform.tail_bound
    if transform.tails != "linear" or isinstance(bound, Tensor):
        raise Unfusable(f"tails {transform.tails!r} of bound {bound}: linear tails of one bound are covered")
    return [_read(part, network, _spline(transform, getattr(network, "hidden_features", 1)))]


def _log_scale(transform: Any, dim: int) -> Scale:
    """The log-scale that the object makes of u, log(softplus(u) + ε) or log(σ(u + 2) + ε): releases differ."""
    u = torch.linspace(-40, 40, 161, dtype=torch.float64)
    numbers = torch.stack([u, torch.zeros_like(u)], 1).repeat(1, dim)
    ell = transform._elementwise_forward(u.new_zeros(len(u), dim), numbers)[1] / dim
    candidates = Scale("softplus", 1e-3), Scale("nflows", 1e-3), Scale("softplus", float(ell[0].exp()))
    return recognised(candidates, u, ell, "its scale is neither softplus(u) + ε nor σ(u + 2) + ε")


def _read(part: Part, network: Any, univariate: Univariate, **options: Any) -> Layer:
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
        outputs=torch.arange(part.shape[0] * numbers_of(univariate)).view(part.shape[0], -1),
        activation=one_activation("its network", activations),
        univariate=univariate,
        network="residual" if residual else "mlp",
        context_layer=getattr(network, "context_layer", None),
        block_contexts=[block.context_layer for block in blocks if hasattr(block, "context_layer")],
        lost=lost(step for block in blocks for step in network_steps(block.dropout)),
        **options,
    ).read()


def columns_of(transform: Any) -> int | None:
    """Number of columns that a coupling or an autoregressive layer works on; None for other layers, and for those on images."""
    convolutions = any(isinstance(module, nn.Conv2d) for module in transform.modules())
    if (features := getattr(transform, "features", None)) is not None and hasattr(transform, "transform_net"):
        return None if convolutions else int(features)
    network = getattr(transform, "autoregressive_net", None)
    return None if network is None else int(network.initial_layer.in_features)
