"""Affine maps and transforms of one kind, stacked into the parameters of a CouplingFlow or an AutoregressiveFlow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glf_fast.conversion.gaps import Affine
from glf_fast.conversion.layers import (
    FIXED,
    FROZEN,
    TRAINED,
    Autoregressive,
    Conditioner,
    Coupling,
    Entries,
    Scale,
    flow_options,
)
from glf_fast.conversion.padded import Padded
from glf_fast.conversion.padding import hidden_widths, padded_dim
from glf_fast.flow import ActNorm, AutoregressiveFlow, CouplingFlow, Flow, InvertibleLinear
from glf_fast.flow.stacked_flow import StackedFlow
from glf_fast.reference import Spline
from glf_fast.reference.made import fan_in, masks

__all__ = ["Sources", "Step", "stack", "stack_autoregressive", "standalone"]

# A parameter of the new flow, its value as a function of the library's parameters, and which entries are trained.
Sources = list[tuple[nn.Parameter, Tensor, Tensor]]


@dataclass(frozen=True)
class Step:
    """y = affine(x), then the transform, both in the library's order of columns."""

    affine: Affine
    transform: Any  # a Coupling, or an Autoregressive in all steps


def stack(steps: Sequence[Step], context_dim: int, sources: Sources) -> tuple[Flow, Tensor]:
    """One flow of all steps, whose couplings differ in nothing but sizes, values and columns; float64.

    Returns the flow and `restore` (D,): column i of the data is the flow's output restore[i].

    The kernels change the last D // 2 columns given the first. Gathers and scatters of other splits are permutations,
    which go into the affine maps on both sides. Where the split has other sizes, D′ − D zero columns fill the halves
    up; they stay zero, because the weights towards them are zero and frozen.
    """
    dim = len(steps[0].affine.s)
    couplings: list[Coupling] = [step.transform for step in steps]
    width = padded_dim(dim, couplings)
    T = width // 2
    P = width - T
    slots = [torch.arange(width)]  # slots[k]: the column, of [x, zeros], in each place before step k
    for coupling in couplings:
        zeros = torch.arange(dim, width)
        free = P - len(coupling.passive)
        slots.append(torch.cat([coupling.passive.cpu(), zeros[:free], coupling.transformed.cpu(), zeros[free:]]))

    first = couplings[0]
    maps = [step.affine for step in steps]
    linear = _parametrisation(maps, padded=width > dim)
    actnorm = any(m.scales() for m in maps)
    with torch.random.fork_rng(devices=[]):  # the values drawn here are overwritten: leave the user's generator alone
        flow = CouplingFlow(
            width, len(steps), hidden_widths(couplings), context_dim, coupling=first.kind(), network=first.conditioner.network,
            activation=first.conditioner.activation.name, activation_constant=first.conditioner.activation.constant,
            dropout=first.conditioner.dropout, add_first=first.add_first, linear=linear, actnorm=actnorm,
            **flow_options(first.univariate),
        ).double()  # fmt: skip
    _install_maps(flow, maps, slots, sources)
    _install_conditioners(flow, couplings, (P, T), sources)
    if width > dim:
        return Padded(flow, dim, slots[-1]), torch.arange(dim)
    return flow, slots[-1].argsort()


def stack_autoregressive(steps: Sequence[Step], context_dim: int, sources: Sources) -> tuple[Flow, Tensor]:
    """One flow of all steps, whose layers differ in nothing but values, masks and whether they take the context; float64.

    Returns the flow and `restore` (D,), as `stack` does. The order of a layer's features is a permutation, which goes into the
    affine maps on both sides.
    """
    dim = len(steps[0].affine.s)
    layers: list[Autoregressive] = [step.transform for step in steps]
    first, network = layers[0], layers[0].conditioner
    maps = [step.affine for step in steps]
    with torch.random.fork_rng(devices=[]):  # the values drawn here are overwritten: leave the user's generator alone
        flow_of = partial(
            AutoregressiveFlow, dim, len(steps), first.hidden, context_dim,
            transform="spline" if isinstance(first.univariate, Spline) else "affine",
            network=first.network, activation=network.activation.name,
            activation_constant=network.activation.constant, context_layer=first.context_layer,
            **flow_options(first.univariate),
            linear=_parametrisation(maps, padded=False), actnorm=any(m.scales() for m in maps),
        )  # fmt: skip
        flow = flow_of()
        seen = torch.tensor([fan_in(layer.degrees[1:], layer.degrees[0]) for layer in layers])
        if not torch.equal(flow.seen(seen), seen):  # else the degrees are the usual ones
            flow = flow_of(degrees=[layer.degrees for layer in layers])
        flow.double()
    _install_maps(flow, maps, [torch.arange(dim), *(layer.order for layer in layers)], sources)
    used = [_used(flow, of_step) for of_step in seen]
    for i, parameter in enumerate(flow.mlp_weights):
        weights, biases = ([getattr(layer.conditioner, name)[i] for layer in layers] for name in ("weights", "biases"))
        missing = [parameter.shape[1] - len(W.value) for W in weights]  # rows of the context
        weights = [W.map(partial(F.pad, pad=(0, 0, rows, 0))) for W, rows in zip(weights, missing, strict=True)]
        read = torch.stack([of_step[i] for of_step in used]) if i < len(used[0]) else None
        _install(flow, f"mlp_weights.{i}", Entries.joined(weights, torch.stack), sources, read)
        _install(flow, f"mlp_biases.{i}", Entries.joined(biases, torch.stack), sources)
    return flow, layers[-1].order.argsort()


def _used(flow: AutoregressiveFlow, seen: Tensor) -> list[Tensor]:
    """The weights of each layer but the context's that a step reads whose units see so many (in, out)."""
    weights, biases = ([tensor[0] for tensor in tensors] for tensors in (flow.mlp_weights, flow.mlp_biases))
    if flow.config["context_layer"]:
        weights, biases = weights[:-1], biases[:-1]
    return masks(weights, biases, seen, flow.event_shape[0])


def standalone(maps: Iterable[Affine], sources: Sources) -> list[nn.Module]:
    """The maps as layers of their own: [ActNorm,] [InvertibleLinear] each, float64; none for the identity."""
    layers: list[nn.Module] = []
    for affine in maps:
        dim = len(affine.s)
        if affine.scales():
            layers.append(_actnorm(affine, sources))
        if affine.W is not None:
            with torch.random.fork_rng(devices=[]):
                layer = InvertibleLinear(dim, linear=_parametrisation([affine], padded=False)).double()
            for name, value in _linear_tensors(layer.linear, affine.W[None]).items():
                _install(layer, name, _entries(value[0], affine.W_trained), sources)
            layers.append(layer)
        elif affine.mixes():
            layers.append(InvertibleLinear(dim, linear="permutation", permutation=affine.order))
    return layers


def _actnorm(affine: Affine, sources: Sources) -> ActNorm:
    layer = ActNorm(len(affine.s)).double()
    _install(layer, "log_scale", _entries(affine.s, affine.s_trained), sources)
    _install(layer, "bias", _entries(affine.b, affine.b_trained), sources)
    layer.load_state_dict({**layer.state_dict(), "initialized": torch.tensor(True)})
    return layer


def _parametrisation(maps: Sequence[Affine], *, padded: bool) -> str:
    """The kind of linear layer that trains what the maps train, see `InvertibleLinear`."""
    if all(m.W is None for m in maps):
        return "permutation"
    trained = [m for m in maps if m.W_trained]
    return "plu" if trained and all(m.regular for m in trained) and not padded else "dense"


def _install_maps(flow: StackedFlow, maps: Sequence[Affine], slots: Sequence[Tensor], sources: Sources) -> None:
    """ActNorms and linear layers of all steps, from the places before a step to those of its coupling."""
    width, dim = flow.event_shape[0], len(maps[0].s)
    extra = width - dim

    def vectors(own: Sequence[Entries]) -> Entries:  # (K, D′), zero in the columns added
        placed = [
            entries.map(lambda v, place=place: F.pad(v, (0, extra))[place])  # type: ignore[misc]
            for entries, place in zip(own, slots, strict=False)
        ]
        return Entries.joined(placed, torch.stack)

    if flow.config["actnorm"]:
        _install(flow, "actnorm_log_scale", vectors([_entries(m.s, m.s_trained) for m in maps]), sources)
        _install(flow, "actnorm_bias", vectors([_entries(m.b, m.b_trained) for m in maps]), sources)
        state = flow.state_dict()
        flow.load_state_dict({**state, "actnorm_initialized": torch.ones_like(state["actnorm_initialized"])})
    if flow.config["linear"] == "permutation":
        added = torch.arange(dim, width)
        for k, affine in enumerate(maps):
            order = torch.cat([affine.order.cpu(), added])
            flow.get_buffer("linear_permutation")[k] = slots[k].argsort()[order[slots[k + 1]]]
        return
    matrices, trained = [], []
    for k, affine in enumerate(maps):
        W = torch.block_diag(affine.matrix(), torch.eye(extra, dtype=affine.s.dtype, device=affine.s.device))
        matrices.append(W[slots[k]][:, slots[k + 1]])
        own = F.pad(_entries(torch.empty(dim, dim), affine.W_trained).roles, (0, extra, 0, extra))
        trained.append(own[slots[k]][:, slots[k + 1]])
    for name, value in _linear_tensors(flow.config["linear"], torch.stack(matrices)).items():
        stacked = torch.stack(trained)
        # One row stands for a vector: with "plu" nothing is padded, so that all of a step is alike.
        _install(flow, f"linear_{name}", Entries(value, stacked if value.ndim == 3 else stacked[:, 0]), sources)


def _linear_tensors(linear: str, W: Tensor) -> dict[str, Tensor]:
    """The stacked tensors of which InvertibleLinear's parametrisation makes W (K, D, D)."""
    if linear == "dense":
        return {"weight": W}
    pivots, L, U = torch.linalg.lu(W)
    diagonal = U.diagonal(dim1=-2, dim2=-1)
    return {
        "lower": L.tril(-1),
        "upper": U.triu(1),
        "log_diag": diagonal.abs().log(),
        "sign": diagonal.sign().detach(),
        "permutation": pivots.detach().argmax(-1),
    }


def _install_conditioners(
    flow: CouplingFlow, couplings: Sequence[Coupling], halves: tuple[int, int], sources: Sources
) -> None:
    """All networks, zero-padded to the flow's widths; what is padded is never trained."""
    P, T = halves
    last = len(flow.mlp_weights) - 1
    networks = [_with_gates(coupling.conditioner, flow.context_dim) for coupling in couplings]
    padded = [_pad_outputs(c.conditioner.factors, c, T) for c in couplings]
    factors = torch.stack(padded)
    factors = torch.where(factors == 0, 1.0, factors)  # of what is padded, or no output of the library
    if not bool((factors == 1).all()):
        flow.multiply(f"mlp_weights.{last}", factors.unsqueeze(-2))
        flow.multiply(f"mlp_biases.{last}", factors)
    for i, parameter in enumerate(flow.mlp_weights):
        n_in, n_out = parameter.shape[-2:]
        weights, biases = [], []
        for coupling, mlp in zip(couplings, networks, strict=True):
            W, b = mlp.weights[i], mlp.biases[i]
            if i == 0:
                passive = len(coupling.passive)
                W = W.map(partial(_insert_rows, position=passive, count=P - passive))
            if i == last:
                W = W.map(partial(_pad_outputs, coupling=coupling, T=T))
                b = Entries(_pad_outputs(b.value, coupling, T, _identity(coupling)), _pad_outputs(b.roles, coupling, T))
            grow = (0, n_out - W.value.shape[-1], 0, n_in - W.value.shape[-2])
            weights.append(W.map(partial(F.pad, pad=grow)))
            biases.append(b.map(partial(F.pad, pad=grow[:2])))
        _install(flow, f"mlp_weights.{i}", Entries.joined(weights, torch.stack), sources)
        _install(flow, f"mlp_biases.{i}", Entries.joined(biases, torch.stack), sources)


def _with_gates(network: Conditioner, width: int) -> Conditioner:
    """A residual network for a flow with a context of so many columns; one that has no gates gets gates of 1.

    They are never trained. σ(40) is 1 in float64.
    """
    if network.gated or not network.blocks or not width:
        return network

    def insert(entries: list[Entries], gate: Tensor) -> list[Entries]:
        first, *inner, last = entries
        pairs = zip(inner[::2], inner[1::2], strict=True)
        return [first, *(found for pair in pairs for found in (*pair, Entries.fixed(gate))), last]

    bias = network.biases[0].value
    return replace(
        network,
        weights=insert(network.weights, bias.new_zeros(width, len(bias))),
        biases=insert(network.biases, torch.full_like(bias, 40.0, requires_grad=False)),
    )


def _insert_rows(W: Tensor, position: int, count: int) -> Tensor:
    zeros = W.new_zeros(*W.shape[:-2], count, W.shape[-1])
    return torch.cat([W[..., :position, :], zeros, W[..., position:, :]], -2)


def _pad_outputs(outputs: Tensor, coupling: Coupling, T: int, fill: Tensor | None = None) -> Tensor:
    """The last dimension, of a network's outputs, with those of T columns: 0, or `fill`, for the columns that are missing.

    Affine couplings have all u before all t; the parameters of one spline lie side by side.
    """
    columns, own = coupling.columns(), len(coupling.transformed)
    apart = not isinstance(coupling.univariate, Spline)  # (…, columns, T) and not (…, T, columns)
    shape = (columns, own) if apart else (own, columns)
    parts = outputs.unflatten(-1, shape)
    parts = parts if apart else parts.mT
    missing = parts.new_zeros(*parts.shape[:-1], T - own)
    if fill is not None:
        missing = missing + fill.to(missing).unsqueeze(-1)
    whole = torch.cat([parts, missing], -1)
    return (whole if apart else whole.mT).flatten(-2)


def _identity(coupling: Coupling) -> Tensor:
    """A network's outputs (columns,), or (2, 1) of two, that leave a column of zeros as it is, at no log-determinant."""
    kind, univariate = coupling.kind(), coupling.univariate
    if isinstance(univariate, Spline):
        outputs = torch.zeros(coupling.columns(), dtype=torch.float64)
        form = univariate.prepared()
        if not form.soft_clip:  # of equal bins, with slopes of 1
            outputs[2 * form.bins :] = math.log(math.expm1(1 / form.factor - form.min_derivative))
        return outputs
    if kind == "additive":
        return torch.zeros(1, dtype=torch.float64)
    u = _u_of_zero(univariate)
    return torch.tensor([u, 0.0] if kind == "affine" else [[u], [0.0]], dtype=torch.float64)


def _u_of_zero(scale: Scale) -> float:
    """The u with f(u) = 0, at which a column of zeros adds nothing to the log-determinant."""
    name, constant = scale
    if name == "glow":
        return 40.0  # log σ(42) = −6e-19
    if name == "nflows" and constant is not None:
        return math.log((1 - constant) / constant) - 2
    if name == "softplus" and constant is not None:
        return math.log(math.expm1(1 - constant))
    return 0.0


def _entries(value: Tensor, trained: bool) -> Entries:
    """A parameter of which all entries have one role."""
    return Entries(value, torch.full_like(value, TRAINED if trained else FROZEN, dtype=torch.uint8))


def _install(module: nn.Module, name: str, entries: Entries, sources: Sources, used: Tensor | None = None) -> None:
    """Give a parameter or buffer its value, and freeze the entries that must keep it, but for those that are never `used`.

    If some are trained, those are all the others. If none is, the parameter is frozen as a whole; a user may unfreeze it,
    all but the FIXED entries.
    """
    value, roles = entries.value, entries.roles
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    if not isinstance(tensor, nn.Parameter):
        tensor.copy_(value)
        return
    assert tensor.shape == value.shape == roles.shape, (name, tensor.shape, value.shape, roles.shape)
    with torch.no_grad():
        tensor.copy_(value)
    trained = roles.to(value.device) == TRAINED
    sources.append((tensor, value, trained))
    if not trained.any():
        tensor.requires_grad_(False)
    free = trained if trained.any() else roles != FIXED
    if used is not None:
        free = free | ~used
    if not free.all():
        assert isinstance(module, StackedFlow)
        module.hold(name, free)
