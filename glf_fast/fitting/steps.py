"""Steps of training on batches that are given: by PyTorch, whatever the flow and its device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glf_fast.fitting.dataset import Rows
from glf_fast.flow import Flow

__all__ = ["Steps", "adamw"]


def adamw(flow: Flow, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """The optimizer of all parameters of a flow that are trained."""
    trained = [p for p in flow.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the flow has no parameters to train")
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
    return torch.optim.AdamW(trained, lr, weight_decay=weight_decay, fused=fused)


class Steps:
    """One step a call, by autograd and torch.optim.

    Args:
        clip: longest gradient, over all parameters; infinity for any.
    """

    def __init__(self, flow: Flow, optimizer: torch.optim.AdamW, rows: Rows, clip: float) -> None:
        self.flow, self.optimizer, self.rows, self.clip = flow, optimizer, rows, clip
        self.trained: list[nn.Parameter] = optimizer.param_groups[0]["params"]

    def run(self, order: Tensor, rates: Sequence[float]) -> tuple[list[float], str]:
        """The first one or more of the steps on the batches `order` (steps, B) at these learning rates.

        Returns the loss before each step that was made, and what was not finite in the next one, which was left out: "loss",
        "gradient" or "".
        """
        x, context, weights = self.rows.pick(order[0], self.trained[0])
        log_prob = self.flow.log_prob(x, context)
        loss = -(log_prob if weights is None else weights.to(log_prob.dtype) * log_prob).mean()
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        found, length = torch.stack([loss.detach(), norm.to(loss.dtype)]).tolist()
        if not math.isfinite(found) or not math.isfinite(length):
            return [], "gradient" if math.isfinite(found) else "loss"
        if length > self.clip:
            nn.utils.clip_grads_with_norm_(self.trained, self.clip, norm)
        self.optimizer.param_groups[0]["lr"] = rates[0]
        self.optimizer.step()
        return [found], ""
