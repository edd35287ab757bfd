"""Training steps of small coupling flows on a GPU by kernels that have the optimizer in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glf_fast.fitting.dataset import Rows
from glf_fast.fitting.fused import parameters_of
from glf_fast.flow import CouplingFlow, Flow
from glf_fast.ops.coupling_flow import training_step
from glf_fast.ops.coupling_flow.training_step import AdamW, Progress, SmallFlowStep, Trained, small_flow_step
from glf_fast.reference import Plu

__all__ = ["small_step"]


def small_step(
    flow: Flow, optimizer: torch.optim.Optimizer, rows: Rows, clip: float, progress: Progress
) -> SmallFlowStep | None:
    """The steps of this training by those kernels; None where others make them.

    They make AdamW's step on the PLU layers, ActNorms and networks of a `CouplingFlow`, all of which are trained. The optimizer
    has its state already, and is one that can be captured.
    """
    group = optimizer.param_groups[0]
    if type(flow) is not CouplingFlow or flow.config["linear"] != "plu" or flow._adjusts:
        return None
    if group["amsgrad"] or group["maximize"] or (group["weight_decay"] and not group["decoupled_weight_decay"]):
        return None
    factors, actnorm, weights, biases = parameters_of(flow)
    parameters = [*factors, *actnorm, *weights, *biases]
    if {*map(id, parameters)} != {*map(id, group["params"])} or not all(map(_ordinary, parameters)):
        return None
    given = [rows.x, rows.context, rows.weights]
    if any(t is not None and not t.is_contiguous() for t in given) or any(p not in optimizer.state for p in parameters):
        return None
    states = [optimizer.state[p] for p in parameters]
    trained = [
        Trained(p.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"])
        for p, state in zip(parameters, states, strict=True)
    ]
    linear, (log_scale, bias) = flow._map_tensors()
    made = small_flow_step(
        Plu(**linear, log_scale=log_scale, bias=bias), weights, biases, flow._options, trained,
        training_step.Rows(rows.x, rows.context, rows.weights), progress,
        AdamW(group["betas"], group["eps"], group["weight_decay"], clip),
    )  # fmt: skip
    if made is not None:
        for p, gradient in zip(parameters, made.gradients, strict=True):
            p.grad = gradient
    return made


def _ordinary(p: Tensor) -> bool:
    return type(p) is nn.Parameter and p.requires_grad and p.is_contiguous()
