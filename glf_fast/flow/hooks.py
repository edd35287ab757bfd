"""Modules that somebody watches."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["has_hooks"]


def has_hooks(layer: Any) -> bool:
    """Whether somebody watches or replaces the calls of a layer: by its hooks, by global ones, by a `forward` of its own."""
    if "forward" in layer.__dict__ or nn.modules.module._has_any_global_hook():
        return True
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
