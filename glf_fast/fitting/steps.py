"""Steps of training on batches that are given: by PyTorch, whatever the flow and its device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glf_fast.fitting.dataset import Rows
from glf_fast.flow import Flow

__all__ = ["Steps", "adamw", "loss_of", "one_step"]


def adamw(flow: Flow, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """The optimizer of all parameters of a flow that are trained."""
    trained = [p for p in flow.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the flow has no parameters to train")
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
    return torch.optim.AdamW(trained, lr, weight_decay=weight_decay, fused=fused)


def loss_of(flow: Flow, x: Tensor, context: Tensor | None, weights: Tensor | None) -> Tensor:
    """The mean of −log p(x | context) over rows, each times its weight."""
    log_prob = flow.log_prob(x, context)
    return -(log_prob if weights is None else weights.to(log_prob.dtype) * log_prob).mean()


def one_step(
    flow: Flow, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor | None, Tensor | None], clip: float
) -> tuple[Tensor, str]:
    """The loss before a step, and what was not finite: "loss", "gradient" or "". The step is made where all is finite.

    Args:
        batch: x, context and weights of the rows.
        clip: longest gradient, over all parameters; infinity for any.
    """
    trained: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    loss = loss_of(flow, *batch)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    loss = loss.detach()
    found, length = torch.stack([loss, norm.to(loss.dtype)]).tolist()
    if not math.isfinite(found) or not math.isfinite(length):
        return loss, "gradient" if math.isfinite(found) else "loss"
    if length > clip:
        nn.utils.clip_grads_with_norm_(trained, clip, norm)
    optimizer.step()
    return loss, ""


class Steps:
    """One step a call, by autograd and torch.optim.

    Args:
        clip: longest gradient, over all parameters; infinity for any.
    """

    def __init__(self, flow: Flow, optimizer: torch.optim.AdamW, rows: Rows, clip: float) -> None:
        self.flow, self.optimizer, self.rows, self.clip = flow, optimizer, rows, clip

    def run(self, order: Tensor, rates: Sequence[float]) -> tuple[list[float], str]:
        """The first one or more of the steps on the batches `order` (steps, B) at these learning rates.

        Returns the loss before each step that was made, and what was not finite in the next one, which was left out: "loss",
        "gradient" or "".
        """
        group = self.optimizer.param_groups[0]
        group["lr"] = rates[0]
        batch = self.rows.pick(order[0], group["params"][0])
        loss, wrong = one_step(self.flow, self.optimizer, batch, self.clip)
        return ([] if wrong else [loss.item()]), wrong
