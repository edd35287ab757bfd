"""Noise and rows of a whole batch for a loss, where DistributedDataParallel has divided the batch among processes.

A loss that is a mean over the items of a batch needs none of this, because the wrapper averages gradients. Outside of the
wrapper's `forward`, a batch is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glf_fast.flow.moments import active_processes

__all__ = ["divided", "noise_like", "share", "whole"]


def divided() -> bool:
    """Whether this is inside of the wrapper's `forward`, and other processes have other parts of the batch."""
    processes = active_processes()
    return processes is not None and dist.get_world_size(processes) > 1


def noise_like(x: Tensor, generator: torch.Generator | None, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
    """Noise for the items of x (B, …), of N(0, 1) or by `draw`: this process's rows of the noise of the whole batch.

    All processes must have as many items, and generators in the same state: then items have the noise that they have in one
    process.
    """
    size = dist.get_world_size(active_processes()) if divided() else 1
    shape = (size * len(x), *x.shape[1:])
    return share(draw(shape, generator=generator, device=x.device, dtype=x.dtype))


def share(x: Tensor) -> Tensor:
    """This process's rows of x (n, …), which all processes have alike; all rows if they cannot be divided equally."""
    if not divided():
        return x
    processes = active_processes()
    size = dist.get_world_size(processes)
    return x if len(x) % size else x.chunk(size)[dist.get_rank(processes)]


def whole(x: Tensor) -> Tensor:
    """The rows (N·B, …) of x (B, …) in all N processes, in their order, with gradients of any order.

    The wrapper averages what the N losses give for a parameter, so a term that all of them compute alike counts once.
    """
    if not divided():
        return x
    processes = active_processes()
    rank, size = dist.get_rank(processes), dist.get_world_size(processes)
    before, behind = (x.new_zeros((count * len(x), *x.shape[1:])) for count in (rank, size - 1 - rank))
    return _Total.apply(torch.cat([before, x, behind]), processes)


class _Total(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Any) -> Tensor:
        ctx.processes = processes
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=processes)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(gradient, ctx.processes), None
