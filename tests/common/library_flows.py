"""Flows of other libraries, called in one way whatever the library: random weights, density, losses of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.reference import log_normal

__all__ = ["log_prob", "losses", "shake"]


def shake(flow: nn.Module, std: float = 0.15) -> Any:
    """Random weights: fresh ones are too small, or zero, to tell a wrong formula. Fixed ones stay."""
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return flow


def log_prob(flow: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
    """log p of vectors (B,), by a flow of nflows, normflows, zuko or FrEIA, there without conditions, or by one of ours."""
    if hasattr(flow, "module_list"):
        z, logdet = flow(x)
        return logdet + log_normal(z)
    if not hasattr(flow, "log_prob"):
        return flow(context).log_prob(x)
    return flow.log_prob(x) if context is None else flow.log_prob(x, context)


def losses(flow: nn.Module, optimizer: type, rate: float, batches: Tensor, context: Tensor | None = None) -> Tensor:
    """The loss before each step of an optimizer, on one batch after the other."""
    steps = optimizer([p for p in flow.parameters() if p.requires_grad], rate)
    found = []
    for batch in batches:
        loss = -log_prob(flow, batch, context).mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        found.append(loss.detach())
    return torch.stack(found)
