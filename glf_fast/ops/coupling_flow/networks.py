"""Flows of other networks as flows of one network that makes [u, t], which is what the GPU's kernels know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glf_fast.ops.coupling_flow.call import Call, CallOptions
from glf_fast.reference import COUPLINGS

__all__ = ["KINDS", "as_one_network", "hidden_widths", "refuses"]

KINDS = ("affine", "separate", "additive")  # of coupling, of which one network that makes [u, t] can be made


def refuses(options: CallOptions, kinds: Sequence[str]) -> str:
    """Why kernels of MLPs and couplings of these kinds know no flow of these options; "" where they do."""
    if options.members > 1:
        return "several flows"
    if options.network != "mlp":
        return "a network other than an MLP"
    return "" if options.coupling in kinds else f"a coupling other than {', '.join(kinds)}"


def as_one_network(call: Call) -> Call:
    """Two networks side by side with zeros between them; an additive coupling's after u = 0, of which e^u makes 1.

    Half of those products are with zeros, which small flows on a GPU do not notice: they wait for launches and latencies.
    Differentiable.
    """
    weights, biases, options = call.weights, call.biases, call.options
    if options.coupling == "separate":
        first = weights[0].transpose(1, 2).flatten(2)  # (K, n₀, 2·n₁): both see the same input
        weights, biases = [first, *map(_block_diagonal, weights[1:])], [bias.flatten(1) for bias in biases]
    elif options.coupling == "additive":
        n_v = call.x.shape[1] // 2
        weights, biases = [*weights[:-1], F.pad(weights[-1], (n_v, 0))], [*biases[:-1], F.pad(biases[-1], (n_v, 0))]
        options = options._replace(log_scale="exp", log_scale_constant=None, constant=0.0)
    return call._replace(weights=weights, biases=biases, options=options._replace(coupling="affine"))


def hidden_widths(call: Call) -> list[int]:
    """Widths of the hidden layers of that one network."""
    networks = COUPLINGS[call.options.coupling].networks
    return [networks * weight.shape[-1] for weight in call.weights[:-1]]


def _block_diagonal(weight: Tensor) -> Tensor:
    """(K, 2, a, b) → (K, 2·a, 2·b)."""
    n = weight.shape[-1]
    u, t = weight.unbind(1)
    return torch.cat([F.pad(u, (0, n)), F.pad(t, (n, 0))], 1)
