"""Affine maps and couplings of one kind, stacked into the parameters of a CouplingFlow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glf_fast.conversion.gaps import Affine
from glf_fast.conversion.layers import FIXED, FROZEN, TRAINED, Conditioner, Coupling
from glf_fast.conversion.padded import Padded
from glf_fast.conversion.padding import hidden_widths, padded_dim
from glf_fast.flow import ActNorm, CouplingFlow, Flow, InvertibleLinear
from glf_fast.flow.stacked_flow import StackedFlow

__all__ = ["Sources", "Step", "install", "install_maps", "parametrisation", "stack", "standalone"]

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
    linear = parametrisation(maps, padded=width > dim)
    actnorm = any(m.scales() for m in maps)
    with torch.random.fork_rng(devices=[]):  # the values drawn here are overwritten: leave the user's generator alone
        flow = CouplingFlow(
            width, len(steps), hidden_widths(couplings), context_dim, coupling=first.kind(), network=first.conditioner.network,
            activation=first.conditioner.activation.name, activation_constant=first.conditioner.activation.constant,
            dropout=first.conditioner.dropout, log_scale=first.log_scale,
            log_scale_constant=first.log_scale_constant, add_first=first.add_first, spline=first.spline, linear=linear,
            actnorm=actnorm,
        ).double()  # fmt: skip
    install_maps(flow, maps, slots, sources)
    _install_conditioners(flow, couplings, (P, T), sources)
    if width > dim:
        return Padded(flow, dim, slots[-1]), torch.arange(dim)
    return flow, slots[-1].argsort()


def standalone(maps: Iterable[Affine], sources: Sources) -> list[nn.Module]:
    """The maps as layers of their own: [ActNorm,] [InvertibleLinear] each, float64; none for the identity."""
    layers: list[nn.Module] = []
    for affine in maps:
        dim = len(affine.s)
        if affine.scales():
            layers.append(_actnorm(affine, sources))
        if affine.W is not None:
            with torch.random.fork_rng(devices=[]):
                layer = InvertibleLinear(dim, linear=parametrisation([affine], padded=False)).double()
            for name, value in _linear_tensors(layer.linear, affine.W[None]).items():
                install(layer, name, value[0], _roles(value[0], affine.W_trained), sources)
            layers.append(layer)
        elif affine.mixes():
            layers.append(InvertibleLinear(dim, linear="permutation", permutation=affine.order))
    return layers


def _actnorm(affine: Affine, sources: Sources) -> ActNorm:
    layer = ActNorm(len(affine.s)).double()
    install(layer, "log_scale", affine.s, _roles(affine.s, affine.s_trained), sources)
    install(layer, "bias", affine.b, _roles(affine.b, affine.b_trained), sources)
    layer.load_state_dict({**layer.state_dict(), "initialized": torch.tensor(True)})
    return layer


def parametrisation(maps: Sequence[Affine], *, padded: bool) -> str:
    """The kind of linear layer that trains what the maps train, see `InvertibleLinear`."""
    if all(m.W is None for m in maps):
        return "permutation"
    trained = [m for m in maps if m.W_trained]
    return "plu" if trained and all(m.regular for m in trained) and not padded else "dense"


def install_maps(flow: StackedFlow, maps: Sequence[Affine], slots: Sequence[Tensor], sources: Sources) -> None:
    """ActNorms and linear layers of all steps, from the places before a step to those of its coupling."""
    width, dim = flow.event_shape[0], len(maps[0].s)
    extra = width - dim

    def vectors(values: Sequence[Tensor]) -> Tensor:  # (K, D′), zero in the columns added
        return torch.stack([F.pad(v, (0, extra))[place.to(v.device)] for v, place in zip(values, slots, strict=False)])

    def roles(trained: Sequence[bool]) -> Tensor:  # FIXED in the columns added
        return vectors([_roles(maps[0].s, flag) for flag in trained])

    if flow.config["actnorm"]:
        s, b = vectors([m.s for m in maps]), vectors([m.b for m in maps])
        install(flow, "actnorm_log_scale", s, roles([m.s_trained for m in maps]), sources)
        install(flow, "actnorm_bias", b, roles([m.b_trained for m in maps]), sources)
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
        own = F.pad(_roles(torch.empty(dim, dim), affine.W_trained), (0, extra, 0, extra))
        trained.append(own[slots[k]][:, slots[k + 1]])
    for name, value in _linear_tensors(flow.config["linear"], torch.stack(matrices)).items():
        stacked = torch.stack(trained)
        # One row stands for a vector: with "plu" nothing is padded, so that all of a step is alike.
        install(flow, f"linear_{name}", value, stacked if value.ndim == 3 else stacked[:, 0], sources)


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
        weights, biases, roles, bias_roles = [], [], [], []
        for coupling, mlp in zip(couplings, networks, strict=True):
            W, b, W_roles, b_roles = mlp.weights[i], mlp.biases[i], mlp.roles[i], mlp.bias_roles[i]
            if i == 0:
                passive = len(coupling.passive)
                W, W_roles = (_insert_rows(t, passive, P - passive) for t in (W, W_roles))
            if i == last:
                b = _pad_outputs(b, coupling, T, _identity(coupling))
                W, W_roles, b_roles = (_pad_outputs(t, coupling, T) for t in (W, W_roles, b_roles))
            grow = (0, n_out - W.shape[-1], 0, n_in - W.shape[-2])
            weights.append(F.pad(W, grow))
            roles.append(F.pad(W_roles, grow))
            biases.append(F.pad(b, grow[:2]))
            bias_roles.append(F.pad(b_roles, grow[:2]))
        install(flow, f"mlp_weights.{i}", torch.stack(weights), torch.stack(roles), sources)
        install(flow, f"mlp_biases.{i}", torch.stack(biases), torch.stack(bias_roles), sources)


def _with_gates(network: Conditioner, width: int) -> Conditioner:
    """A residual network for a flow with a context of so many columns; one that has no gates gets gates of 1.

    They are never trained. σ(40) is 1 in float64.
    """
    if network.gated or not network.blocks or not width:
        return network

    def insert(tensors: list[Tensor], rows: tuple[int, ...], value: float) -> list[Tensor]:
        first, *inner, last = tensors
        gate = first.new_full((*rows, first.shape[-1]), value)
        pairs = zip(inner[::2], inner[1::2], strict=True)
        return [first, *(tensor for pair in pairs for tensor in (*pair, gate)), last]

    return replace(
        network,
        weights=insert(network.weights, (width,), 0.0),
        biases=insert(network.biases, (), 40.0),
        roles=insert(network.roles, (width,), FIXED),
        bias_roles=insert(network.bias_roles, (), FIXED),
    )


def _insert_rows(W: Tensor, position: int, count: int) -> Tensor:
    zeros = W.new_zeros(*W.shape[:-2], count, W.shape[-1])
    return torch.cat([W[..., :position, :], zeros, W[..., position:, :]], -2)


def _pad_outputs(outputs: Tensor, coupling: Coupling, T: int, fill: Tensor | None = None) -> Tensor:
    """The last dimension, of a network's outputs, with those of T columns: 0, or `fill`, for the columns that are missing.

    Affine couplings have all u before all t; the parameters of one spline lie side by side.
    """
    columns, own = coupling.columns(), len(coupling.transformed)
    apart = coupling.spline is None  # (…, columns, T) and not (…, T, columns)
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
    kind = coupling.kind()
    if coupling.spline is not None:
        outputs = torch.zeros(coupling.columns(), dtype=torch.float64)
        form = coupling.spline.prepared()
        if not form.soft_clip:  # of equal bins, with slopes of 1
            outputs[2 * form.bins :] = math.log(math.expm1(1 / form.factor - form.min_derivative))
        return outputs
    if kind == "additive":
        return torch.zeros(1, dtype=torch.float64)
    u = _u_of_zero(coupling.log_scale, coupling.log_scale_constant)
    return torch.tensor([u, 0.0] if kind == "affine" else [[u], [0.0]], dtype=torch.float64)


def _u_of_zero(log_scale: str, constant: float | None) -> float:
    """The u with f(u) = 0, at which a column of zeros adds nothing to the log-determinant."""
    if log_scale == "glow":
        return 40.0  # log σ(42) = −6e-19
    if log_scale == "nflows":
        assert constant is not None
        return math.log((1 - constant) / constant) - 2
    if log_scale == "softplus":
        assert constant is not None
        return math.log(math.expm1(1 - constant))
    return 0.0


def _roles(like: Tensor, trained: bool) -> Tensor:
    """The roles of parameters of that shape."""
    return torch.full_like(like, TRAINED if trained else FROZEN, dtype=torch.uint8)


def install(
    module: nn.Module, name: str, value: Tensor, roles: Tensor, sources: Sources, used: Tensor | None = None
) -> None:
    """Give a parameter or buffer its value, and freeze the entries that must keep it, but for those that are never `used`.

    If some are trained, those are all the others. If none is, the parameter is frozen as a whole; a user may unfreeze it,
    all but the FIXED entries.
    """
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
