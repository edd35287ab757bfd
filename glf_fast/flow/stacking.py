"""Steps of a coupling flow as layers, and layers as stacked tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glf_fast.flow.actnorm import ActNorm
from glf_fast.flow.affine_coupling import AffineCoupling
from glf_fast.flow.coupling import Coupling
from glf_fast.flow.linear import LINEAR_TENSORS, InvertibleLinear
from glf_fast.flow.mlp import MLP, SeparateNetworks
from glf_fast.flow.residual import ResidualNet
from glf_fast.flow.sequential import SequentialFlow
from glf_fast.flow.spline_coupling import SplineCoupling, spline_of
from glf_fast.reference import COUPLINGS

__all__ = ["Stacked", "configuration", "fill_step", "new_step", "stacked", "stacked_maps"]


class Stacked(NamedTuple):
    """The tensors of K equal steps, (K, …)."""

    actnorm: dict[str, Tensor]  # of `ActNorm`, empty without
    linear: dict[str, Tensor]  # of LINEAR_TENSORS
    weights: Sequence[Tensor]  # (K, in, out), multiplied from the right, or (K, networks, in, out)
    biases: Sequence[Tensor]


def new_step(config: Mapping[str, Any]) -> list[nn.Module]:
    """The layers of one fresh step: [ActNorm,] InvertibleLinear, AffineCoupling or SplineCoupling."""
    dim, kind = config["dim"], COUPLINGS[config["coupling"]]
    spline = spline_of(config["spline"]) if config["coupling"] == "spline" else None

    residual, context_dim = config["network"] == "residual", config["context_dim"]

    def network() -> MLP | ResidualNet:
        n_in, n_out = dim - dim // 2, (spline.columns if spline else kind.columns) * (dim // 2)
        hidden = config["hidden"]
        chosen = {name: config[name] for name in ("activation", "activation_constant", "dropout")}
        if residual:
            return ResidualNet(n_in, hidden, n_out, context_dim=context_dim, **chosen)
        return MLP(n_in + context_dim, hidden, n_out, **chosen)

    conditioner = network() if kind.networks == 1 else SeparateNetworks(*(network() for _ in range(kind.networks)))
    pass_context = residual and context_dim > 0
    coupling: Coupling
    if spline:
        coupling = SplineCoupling(dim, conditioner, spline=spline, pass_context=pass_context)
    else:
        options = {name: config[name] for name in ("log_scale", "log_scale_constant", "add_first")}
        additive = config["coupling"] == "additive"
        coupling = AffineCoupling(dim, conditioner, additive=additive, pass_context=pass_context, **options)
    actnorm = [ActNorm(dim)] if config["actnorm"] else []
    return [*actnorm, InvertibleLinear(dim, linear=config["linear"]), coupling]


@torch.no_grad()
def stacked(layers: Sequence[nn.Module], config: Mapping[str, Any]) -> Stacked:
    """The tensors of the layers of all steps, copied; those of parameters are parameters."""
    networks = [_linears(layer) for layer in layers if isinstance(layer, Coupling)]
    # nn.Linear stores (out, in).
    one = COUPLINGS[config["coupling"]].networks == 1
    weights, biases = [], []
    for step in zip(*networks, strict=True):  # the linear layers of one depth: of each step, and there of each network
        weight = torch.stack([torch.stack([linear.weight.T for linear in of_step]) for of_step in step])
        bias = torch.stack([torch.stack([linear.bias for linear in of_step]) for of_step in step])
        weights.append(weight[:, 0].contiguous() if one else weight)
        biases.append(bias[:, 0].contiguous() if one else bias)
    return Stacked(*stacked_maps(layers, config["linear"]), weights, biases)


@torch.no_grad()
def stacked_maps(layers: Sequence[nn.Module], linear: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same of their ActNorms and of their linear layers, which are of this kind."""
    actnorms = [layer for layer in layers if isinstance(layer, ActNorm)]
    linears = [layer for layer in layers if isinstance(layer, InvertibleLinear)]
    names = ("log_scale", "bias", "initialized") if actnorms else ()
    return (
        {name: _stack([getattr(layer, name) for layer in actnorms]) for name in names},
        {name: _stack([getattr(layer, name) for layer in linears]) for name in LINEAR_TENSORS[linear]},
    )


def _stack(tensors: list[Tensor]) -> Tensor:
    found = torch.stack(tensors)
    return nn.Parameter(found) if isinstance(tensors[0], nn.Parameter) else found


@torch.no_grad()
def fill_step(step: Sequence[nn.Module], values: Stacked, k: int) -> None:
    """Give the layers of a fresh step the values of step k."""
    *actnorm, linear, coupling = step
    if actnorm:
        actnorm[0].load_state_dict({name: value[k] for name, value in values.actnorm.items()})
    linear.load_state_dict({name: value[k] for name, value in values.linear.items()})
    for weight, bias, linears in zip(values.weights, values.biases, _linears(coupling), strict=True):
        for j, layer in enumerate(linears):
            network = k if len(linears) == 1 else (k, j)
            layer.weight.copy_(weight[network].T)
            layer.bias.copy_(bias[network])


def configuration(flow: SequentialFlow) -> dict[str, Any]:
    """The constructor's arguments of the `CouplingFlow` of the same steps.

    Raises:
        ValueError: that names the first layer that breaks the pattern.
    """
    layers = list(flow.layers)
    if not layers:
        raise ValueError("the flow has no layers to stack")
    length = 3 if isinstance(layers[0], ActNorm) else 2
    if len(layers) % length:
        raise ValueError(f"{len(layers)} layers cannot be split into equal steps of {length}")
    starts = range(0, len(layers), length)
    configs = [_configuration_of_step(layers[i : i + length], i, flow.context_dim) for i in starts]
    for k, config in enumerate(configs):
        for name, value in config.items():
            if value != configs[0][name]:
                raise ValueError(
                    f"step {k} has {name}={value!r} but step 0 has {configs[0][name]!r}: steps must be equal"
                )
    return {"steps": len(configs), **configs[0]}


def _configuration_of_step(step: Sequence[nn.Module], position: int, context_dim: int) -> dict[str, Any]:
    """The same of one step, whose first layer is at a position in the flow."""
    kinds = (InvertibleLinear, Coupling) if len(step) == 2 else (ActNorm, InvertibleLinear, Coupling)
    for i, (layer, kind) in enumerate(zip(step, kinds, strict=True)):
        if not isinstance(layer, kind):
            raise ValueError(
                f"layer {position + i} is {type(layer).__name__}; a CouplingFlow has {kind.__name__} there"
            )
    linear, coupling = step[-2], step[-1]
    assert isinstance(linear, InvertibleLinear) and isinstance(coupling, Coupling)
    networks = _networks(coupling)
    gated = context_dim if networks and isinstance(networks[0], ResidualNet) else 0
    unlike = {
        "flip": coupling.flip,
        "undo": coupling.undo,
        "mask": coupling.mask != "channels",
        "pass_context": coupling.pass_context != (gated > 0),
    }
    if any(unlike.values()) or not networks or getattr(networks[0], "context_dim", 0) != gated:
        option = next((f"{name}={getattr(coupling, name)}" for name, is_set in unlike.items() if is_set), None)
        what = f"has {option}" if option else f"has a {type(coupling.conditioner).__name__} as conditioner"
        raise ValueError(
            f"layer {position + len(step) - 1} {what}; a CouplingFlow's couplings are unflipped, with an MLP or two equal ones "
            "or a ResidualNet with the flow's context"
        )
    return {
        "dim": coupling.dim,
        "hidden": _hidden(networks[0]),
        "context_dim": context_dim,
        "network": "mlp" if isinstance(networks[0], MLP) else "residual",
        "activation": networks[0].activation,
        "activation_constant": networks[0].activation_constant,
        "dropout": networks[0].dropout,
        **_formula(coupling, len(networks)),
        "linear": linear.linear,
        "actnorm": len(step) == 3,
    }


def _hidden(network: MLP | ResidualNet) -> tuple[int, ...]:
    """Widths of its hidden layers, or of its blocks."""
    inner = network.linears()[:-1] if isinstance(network, MLP) else [network.first] * len(network.blocks)
    return tuple(layer.out_features for layer in inner)


def _formula(coupling: Coupling, networks: int) -> dict[str, Any]:
    """What a coupling with so many networks does to v, as arguments of `CouplingFlow`."""
    if isinstance(coupling, SplineCoupling):
        return {"coupling": "spline", "spline": coupling.spline._asdict()}
    assert isinstance(coupling, AffineCoupling)
    return {
        "coupling": "additive" if coupling.additive else "separate" if networks == 2 else "affine",
        "log_scale": coupling.log_scale,
        "log_scale_constant": coupling.log_scale_constant,
        "add_first": coupling.add_first,
    }


def _networks(coupling: Coupling) -> Sequence[MLP | ResidualNet]:
    """The networks of its conditioner: an MLP, two equal ones or a residual network; none if it is something else."""
    conditioner = coupling.conditioner
    if not isinstance(conditioner, SeparateNetworks):
        return [conditioner] if isinstance(conditioner, MLP | ResidualNet) else []
    u, t = conditioner.u, conditioner.t
    affine = isinstance(coupling, AffineCoupling) and not coupling.additive
    if not affine or not (isinstance(u, MLP) and isinstance(t, MLP)) or str(u) != str(t) or u is t:
        return []
    return [u, t]


def _linears(coupling: nn.Module) -> list[tuple[nn.Linear, ...]]:
    """The linear layers of its networks side by side, first to last."""
    assert isinstance(coupling, Coupling)
    return list(zip(*(network.linears() for network in _networks(coupling)), strict=True))
