"""Steps of training a stacked flow on a processor: many in one call of C++ (csrc/cpu/fit.h), with the GIL released."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.fitting.dataset import Rows
from glf_fast.flow import AutoregressiveFlow, CouplingFlow, Flow
from glf_fast.flow.stacked_flow import StackedFlow
from glf_fast.ops.backends import CPP, usable
from glf_fast.ops.codes import ACTIVATION_CODES, COUPLING_CODES, LOG_SCALE_CODES, NETWORK_CODES
from glf_fast.ops.coupling_flow.cpp import OF_WIDE, RECORDS_LIMIT, WIDE
from glf_fast.reference import constant_of_activation, prepared_constant

__all__ = ["FusedSteps", "parameters_of", "why_not"]

SECONDS = 0.2  # of a call, after which Ctrl-C, callbacks and the display have their turn
operations = torch.ops.glf_fast


def why_not(flow: Flow, batch_size: int) -> str:
    """Why the steps of this flow cannot be fused; "" where they can."""
    if type(flow) not in (CouplingFlow, AutoregressiveFlow) or "log_prob" in vars(flow):
        return "not a CouplingFlow or an AutoregressiveFlow"
    assert isinstance(flow, StackedFlow)
    options = flow.config
    if options.get("reversible") or options.get("coupling", options.get("transform")) not in COUPLING_CODES:
        return "a reversible flow, or a coupling that csrc has not"
    if options.get("dropout"):
        return "dropout"
    if not flow._started and batch_size < 2:
        return "ActNorms that a batch of one row cannot start"
    parameters = [t for part in parameters_of(flow) for t in part]
    if len({*map(id, parameters)} & {*map(id, flow.parameters())}) < len(parameters):
        return "parameters that are computed from others, or shared"
    if not all(_plain(p) for p in parameters):
        return "parameters with hooks, or on other devices"
    return "" if all(usable(CPP, p) for p in parameters) else "no C++ kernels here"


def _plain(p: Tensor) -> bool:
    hooked = p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
    return type(p) is nn.Parameter and p.device.type == "cpu" and p.is_contiguous() and not hooked


def parameters_of(flow: StackedFlow) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters of linear layers, of ActNorms, weights and biases, as the operations take them."""
    linear, actnorm = flow._map_tensors()
    factors = [t for name, t in linear.items() if name not in ("sign", "permutation")]
    weights, biases = flow._mlp()
    return factors, [t for t in actnorm if t is not None], weights, biases


def _networks(flow: StackedFlow) -> tuple[Any, list[Any]]:
    """The operation that trains this flow, and what it takes of the networks besides their weights."""
    options: dict[str, Any] = flow._options  # type: ignore[assignment]
    functions = [
        NETWORK_CODES[options["network"]],
        ACTIVATION_CODES[options["activation"]],
        constant_of_activation(options["activation"], options.get("activation_constant")),
        LOG_SCALE_CODES[options["log_scale"]],
        prepared_constant(options["log_scale"], options["log_scale_constant"]),
    ]
    spline = [] if options["spline"] is None else options["spline"].prepared().numbers()
    if isinstance(flow, AutoregressiveFlow):
        seen = flow._fan_in[torch.device("cpu")]
        transform = COUPLING_CODES[options["transform"]]
        return operations.cpu_autoregressive_fit.default, [
            seen,
            transform,
            *functions,
            options["context_layer"],
            spline,
        ]
    return operations.cpu_fit.default, [COUPLING_CODES[options["coupling"]], *functions, options["add_first"], spline]


class FusedSteps:
    """As many steps a call as fit into `SECONDS`. The parameters and the optimizer's state are changed in place.

    Args:
        clip: longest gradient, over all parameters; infinity for any.
    """

    def __init__(self, flow: StackedFlow, optimizer: torch.optim.AdamW, rows: Rows, clip: float) -> None:
        self.flow, self.optimizer, self.clip = flow, optimizer, clip
        like = flow.mlp_weights[0]
        x, context, weights = (
            None if t is None else t.to(like).contiguous() for t in (rows.x, rows.context, rows.weights)
        )
        assert x is not None
        self.rows = Rows(x, context, weights)

    def run(self, order: Tensor, rates: Sequence[float]) -> tuple[list[float], str]:
        """As `Steps.run`."""
        flow, rows = self.flow, self.rows
        if not flow._started:
            with torch.no_grad():
                flow.log_prob(*rows.pick(order[0], rows.x)[:2])
        parts = parameters_of(flow)
        parameters = [t for part in parts for t in part]
        buffers: dict[str, Tensor | None] = flow._buffers
        group = self.optimizer.param_groups[0]
        means, squares = (self._moments(parameters, name) for name in ("exp_avg", "exp_avg_sq"))
        counts = [self.optimizer.state[p]["step"] for p in group["params"]]
        losses = torch.zeros(len(order), dtype=torch.float64)
        operation, networks = _networks(flow)
        wide = len(flow.mlp_weights) > 1 and flow.mlp_weights[0].shape[-1] >= WIDE and isinstance(flow, CouplingFlow)
        limit = RECORDS_LIMIT * OF_WIDE if wide else RECORDS_LIMIT
        done = operation(
            order.contiguous(), torch.tensor(rates, dtype=torch.float64), rows.x, rows.context, rows.weights,
            buffers.get("linear_permutation"), buffers.get("linear_sign"),
            *([t.detach() for t in part] for part in parts), means, squares, losses, *networks,
            int(counts[0]) + 1, *group["betas"], group["eps"], group["weight_decay"],
            self.clip if math.isfinite(self.clip) else None, limit, SECONDS,
        )  # fmt: skip
        made = done if done >= 0 else -1 - done
        for parameter, count in zip(group["params"], counts, strict=True):
            count += made
            torch.autograd.graph.increment_version(parameter)
        found = losses.tolist()
        wrong = "" if done >= 0 else "gradient" if math.isfinite(found[made]) else "loss"
        return found[:made], wrong

    def _moments(self, parameters: Sequence[Tensor], name: str) -> list[Tensor]:
        """A moment of each parameter, which starts at 0; empty where it is not trained."""
        for p in self.optimizer.param_groups[0]["params"]:
            if not self.optimizer.state[p]:
                self.optimizer.state[p] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        state = self.optimizer.state
        return [state[p][name] if p.requires_grad and p in state else p.new_empty(0) for p in parameters]
