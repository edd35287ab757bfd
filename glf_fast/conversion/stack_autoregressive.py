"""Affine maps and autoregressive layers of one kind, stacked into the parameters of an AutoregressiveFlow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from glf_fast.conversion.layers import Autoregressive
from glf_fast.conversion.stack import Sources, Step, install, install_maps, parametrisation
from glf_fast.flow import AutoregressiveFlow, Flow
from glf_fast.reference.made import fan_in, masks

__all__ = ["stack_autoregressive"]


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
            transform="affine" if first.spline is None else "spline",
            network=first.network, spline=first.spline, activation=network.activation.name,
            activation_constant=network.activation.constant, log_scale=first.log_scale,
            log_scale_constant=first.log_scale_constant, context_layer=first.context_layer,
            linear=parametrisation(maps, padded=False), actnorm=any(m.scales() for m in maps),
        )  # fmt: skip
        flow = flow_of()
        seen = torch.tensor([fan_in(layer.degrees[1:], layer.degrees[0]) for layer in layers])
        if not torch.equal(flow.seen(seen), seen):  # else the degrees are the usual ones
            flow = flow_of(degrees=[layer.degrees for layer in layers])
        flow.double()
    install_maps(flow, maps, [torch.arange(dim), *(layer.order for layer in layers)], sources)
    used = [_used(flow, of_step) for of_step in seen]
    for i, parameter in enumerate(flow.mlp_weights):
        rows = parameter.shape[1]
        values, roles, biases, bias_roles = (
            [getattr(layer.conditioner, name)[i] for layer in layers]
            for name in ("weights", "roles", "biases", "bias_roles")
        )
        values, roles = ([F.pad(t, (0, 0, rows - len(t), 0)) for t in tensors] for tensors in (values, roles))
        read = torch.stack([of_step[i] for of_step in used]) if i < len(used[0]) else None
        install(flow, f"mlp_weights.{i}", torch.stack(values), torch.stack(roles), sources, read)
        install(flow, f"mlp_biases.{i}", torch.stack(biases), torch.stack(bias_roles), sources)
    return flow, layers[-1].order.argsort()


def _used(flow: AutoregressiveFlow, seen: Tensor) -> list[Tensor]:
    """The weights of each layer but the context's that a step reads whose units see so many (in, out)."""
    weights, biases = ([tensor[0] for tensor in tensors] for tensors in (flow.mlp_weights, flow.mlp_biases))
    if flow.config["context_layer"]:
        weights, biases = weights[:-1], biases[:-1]
    return masks(weights, biases, seen, flow.event_shape[0])
