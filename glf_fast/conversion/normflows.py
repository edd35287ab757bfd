"""Reads flows of normflows: `NormalizingFlow` and `ConditionalNormalizingFlow` on vectors, with a diagonal normal base.

A normflows layer's `forward` is noise → data and its list of layers starts at the noise; here both are turned around.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.layers import Conditioner, Coupling, Dense, Diagonal, Layer, Permutation, Unfusable
from glf_fast.conversion.mlp import read_mlp, select_inputs, select_outputs, separate, without_shift
from glf_fast.conversion.reading import ConversionError, Reading, context_features, read_each, trained_together

__all__ = ["KeptLayer", "check_initialised", "columns", "named_layers", "read", "read_layer"]


def read(flow: Any, device: str = "cpu") -> Reading:
    """The layers of a `NormalizingFlow` or `ConditionalNormalizingFlow`, data → noise."""
    base = flow.q0
    if type(base).__name__ != "DiagGaussian" or len(base.shape) != 1:
        shape = f" of shape {tuple(base.shape)}" if hasattr(base, "shape") else ""
        raise ConversionError(f"q0 ({type(base).__name__}{shape}): the base must be a DiagGaussian on vectors")
    if base.temperature is not None:
        raise ConversionError(f"q0 (DiagGaussian): temperature is {base.temperature}; set it to None")
    dim = int(base.shape[0])
    conditional = any(kind.__name__ == "ConditionalNormalizingFlow" for kind in type(flow).__mro__)
    layers = read_each(named_layers(flow.flows), lambda module: read_layer(module, dim), KeptLayer, device, [base])
    features = context_features(flow.modules()) if conditional else 0

    def log_prob(x: Tensor, context: Tensor | None) -> Tensor:
        return flow.log_prob(x, context) if conditional else flow.log_prob(x)

    def inverse(z: Tensor, context: Tensor | None) -> Tensor:
        z = base.loc + base.log_scale.exp() * z
        return flow.forward(z, context) if conditional else flow.forward(z)

    return Reading(
        layers=[*layers, *_base(base)],
        event_shape=(dim,),
        log_prob=log_prob,
        inverse=inverse,
        context_shape=(features,) if features else (),
    )


def named_layers(flows: nn.ModuleList, prefix: str = "flows") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every layer, data → noise, those inside a `Composite` or a `GlowBlock` too."""
    for i in reversed(range(len(flows))):
        name = f"{prefix}.{i}"
        inner = _COMPOSITES.get(type(flows[i]).__name__)
        if inner is not None and type(flows[i]).__module__.startswith("normflows."):
            yield from named_layers(getattr(flows[i], inner), f"{name}.{inner}")
        else:
            yield name, flows[i]


_COMPOSITES = {"Composite": "_flows", "GlowBlock": "flows"}


def read_layer(module: nn.Module, dim: int) -> list[Layer]:
    """One layer on `dim` columns, data → noise; raises Unfusable."""
    reader = _READERS.get(type(module).__name__)
    if reader is None or not type(module).__module__.startswith("normflows."):
        raise Unfusable("no kernel covers this kind of layer")
    return reader(module, dim)


def columns(module: Any) -> int | None:
    """How many columns a layer works on, where it says so: normflows' flows do not."""
    kind = type(module).__name__
    if kind in ("ActNorm", "AffineConstFlow"):
        return module.s.shape[1] if module.s.ndim == 2 else None
    if kind in ("InvertibleAffine", "Permute"):
        return module.num_channels
    if kind == "LULinearPermute":
        return module.linear.features
    if kind == "MaskedAffineFlow":
        return module.b.numel() if module.b.ndim == 2 else None
    if kind == "AffineCouplingBlock":
        try:
            net = read_mlp(module.flows[1].param_map)
        except Unfusable:
            return None
        return net.n_in + (net.n_out // 2 if module.flows[1].scale else net.n_out)
    return None


class KeptLayer(nn.Module):
    """A normflows layer with its directions exchanged: forward is data → noise."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if type(layer).__name__ in ("Split", "Merge", "AffineCoupling"):
            raise ConversionError(f"{type(layer).__name__} works on lists; use an AffineCouplingBlock")
        if type(layer).__name__ == "BatchNorm":
            raise ConversionError("BatchNorm normalises with each batch's own statistics and has no inverse")
        if type(layer).__name__ in ("Residual", "MetropolisHastings", "HamiltonianMonteCarlo"):
            raise ConversionError(f"{type(layer).__name__}: its log-determinant is a random estimate")
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise."""
        return self._run(self.layer.inverse, x, context)  # type: ignore[arg-type]

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data."""
        return self._run(self.layer.forward, z, context)

    def _run(self, direction: Callable[..., Any], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        takes_context = "context" in inspect.signature(direction).parameters
        y, logdet = direction(x, context=context) if takes_context else direction(x)
        return y, logdet + x.new_zeros(len(x))  # some return one number for the whole batch


# -- one function per class --------------------------------------------------------------------------------------------


def _affine_coupling_block(module: Any, dim: int) -> list[Layer]:
    split, coupling, _ = module.flows
    device = next(module.parameters()).device
    columns = torch.arange(dim, device=device)
    half = dim - dim // 2
    if split.mode == "channel":
        passive, transformed = columns[:half], columns[half:]
    elif split.mode == "channel_inv":
        transformed, passive = columns[:half], columns[half:]
    elif split.mode in ("checkerboard", "checkerboard_inv") and dim % 2 == 0:
        passive, transformed = columns[1::2], columns[0::2]
        if split.mode == "checkerboard_inv":
            passive, transformed = transformed, passive
    else:
        raise Unfusable(f"split_mode {split.mode!r} does not split {dim} columns")
    net = read_mlp(coupling.param_map)
    t = len(transformed)
    _check_widths(net, len(passive), 2 * t if coupling.scale else t)
    # Data → noise is (v − shift)·scale: add first, with the shift's columns negated.
    if not coupling.scale:
        conditioner = select_outputs(net, torch.arange(t, device=device), -1.0)
        return [Coupling(passive, transformed, conditioner, "exp", None, add_first=True)]
    shift_first = torch.arange(2 * t, device=device)
    raw_scale_then_shift = torch.cat([shift_first[1::2], shift_first[0::2]])
    if coupling.scale_map not in _SCALE_MAPS:
        raise Unfusable(f"scale_map {coupling.scale_map!r} is not covered")
    log_scale, constant, factor_u, undo = _SCALE_MAPS[coupling.scale_map]
    factor = net.weights[-1].new_ones(2 * t)
    factor[:t] = factor_u
    if not undo:
        factor[t:] = -1.0
    conditioner = select_outputs(net, raw_scale_then_shift, factor)
    return [Coupling(passive, transformed, conditioner, log_scale, constant, add_first=not undo, undo=undo)]


# scale_map → log-scale, its constant, what u is multiplied by, and whether data → noise divides by the scale.
_SCALE_MAPS: dict[str, tuple[str, float | None, float, bool]] = {
    "exp": ("exp", None, -1.0, False),  # (v − t)·e^−u
    "sigmoid": ("glow", 2.0, 1.0, False),  # (v − t)·σ(u + 2)
    "sigmoid_inv": ("glow", 2.0, 1.0, True),  # (v − t)/σ(u + 2)
}


def _masked_affine_flow(module: Any, dim: int) -> list[Layer]:
    mask = module.b.flatten()
    if len(mask) != dim or not bool(((mask == 0) | (mask == 1)).all()):
        raise Unfusable("its mask is not one 0 or 1 per column")
    passive, transformed = mask.nonzero().flatten(), (mask == 0).nonzero().flatten()
    nets: list[Conditioner | None] = []
    for net in (module.s, module.t):
        if net is torch.zeros_like:
            nets.append(None)
            continue
        full = read_mlp(net)
        _check_widths(full, dim, dim)
        # z ← (z − t)·e^−s; the network sees b·z, so that only passive columns count.
        nets.append(select_outputs(select_inputs(full, passive), transformed, -1.0))
    net_s, net_t = nets
    if not len(transformed) or (net_s is None and net_t is None):
        return []
    if not len(passive):
        raise Unfusable("its mask leaves no column to condition on")
    if net_s is not None and net_t is not None:
        conditioner = separate(net_s, net_t)
    elif net_t is not None:
        conditioner = net_t
    else:
        assert net_s is not None
        conditioner = without_shift(net_s)
    return [Coupling(passive, transformed, conditioner, "exp", None, add_first=True)]


def _affine_const_flow(module: Any, dim: int) -> list[Layer]:
    if tuple(module.s.shape) != (1, dim):
        raise Unfusable(f"its shape {tuple(module.s.shape[1:])} is not that of a vector of {dim}")
    check_initialised(module)
    s, t = module.s[0], module.t[0]
    return [Diagonal(-s, -t * torch.exp(-s), trained_together(module.s, module.t))]


def _permute(module: Any, dim: int) -> list[Layer]:
    if module.num_channels != dim:
        raise Unfusable(f"it permutes {module.num_channels} columns of {dim}")
    if module.mode == "shuffle":
        return [Permutation(module.inv_perm)]
    return [Permutation(torch.arange(dim).roll(-((dim + 1) // 2)))]


def _lu_linear_permute(module: Any, dim: int) -> list[Layer]:
    linear = module.linear
    trained = trained_together(*linear.parameters())
    dense = Dense(linear.weight().T, linear.bias.view(-1), trained, regular=True)  # x Wᵀ + bias
    return [Permutation(module.permutation._permutation), dense]


def _invertible_affine(module: Any, dim: int) -> list[Layer]:
    W = module._assemble_W() if module.use_lu else module.W
    return [Dense(W, W.new_zeros(dim), trained_together(*module.parameters()), regular=module.use_lu)]


_READERS: dict[str, Callable[[Any, int], list[Layer]]] = {
    "ActNorm": _affine_const_flow,
    "AffineConstFlow": _affine_const_flow,
    "AffineCouplingBlock": _affine_coupling_block,
    "InvertibleAffine": _invertible_affine,
    "LULinearPermute": _lu_linear_permute,
    "MaskedAffineFlow": _masked_affine_flow,
    "Permute": _permute,
}


# -- helpers -----------------------------------------------------------------------------------------------------------


def check_initialised(module: nn.Module) -> None:
    """Raise ConversionError for an ActNorm, `module` or in it, that has not seen a batch.

    Any call, a comparison's too, would initialise it with what happens to come first.
    """
    if any(not bool(getattr(part, "data_dep_init_done", True)) for part in module.modules()):
        raise ConversionError("an ActNorm has not been initialised: send a batch of data through the flow first")


def _base(base: Any) -> list[Layer]:
    """N(loc, e^(2·log_scale)) as the map to N(0, I)."""
    loc, log_scale = base.loc[0], base.log_scale[0]
    try:
        trained = trained_together(base.loc, base.log_scale)
    except Unfusable as reason:
        raise ConversionError(f"q0 (DiagGaussian): {reason}") from None
    if not trained and not loc.any() and not log_scale.any():
        return []
    return [Diagonal(-log_scale, -loc * torch.exp(-log_scale), trained)]


def _check_widths(net: Conditioner, inputs: int, outputs: int) -> None:
    have = net.n_in, net.n_out
    if have != (inputs, outputs):
        raise Unfusable(f"its network maps {have[0]} columns to {have[1]} where {inputs} to {outputs} are meant")
