"""What kernels do not give: second derivatives, and batches of gradients, both of the same function in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["differentiate", "plain_gradients_wanted"]


def plain_gradients_wanted(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward must leave the kernels: for a second derivative, or for a batch of gradients (is_grads_batched)."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or any(
        g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads
    )


def differentiate(
    run: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, or batched: those of `run`, the same function in plain PyTorch."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Through aliases: where one input was computed from another, its gradient must not run into the other's.
        aliases = [None if x is None else x.view_as(x) for x in inputs]
        targets = [x for x, want in zip(aliases, wanted, strict=True) if want and x is not None]
        # The logdet of additive couplings is a constant, 0: it has no gradient.
        varying = [(y, g) for y, g in zip(run(*aliases), grads, strict=True) if y.requires_grad]
        outputs, grads = zip(*varying, strict=True)
        found = iter(torch.autograd.grad(outputs, targets, grads, create_graph=again))
    return [next(found) if want and x is not None else None for x, want in zip(aliases, wanted, strict=True)]
