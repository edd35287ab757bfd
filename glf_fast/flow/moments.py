"""Means and standard deviations of a batch, also of one that DistributedDataParallel has divided among processes."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["active_processes", "moments", "not_traced", "refuse_shards"]

# torch.compiler.disable as torch's own modules use it, which imports dynamo and triton when it is called, not where it stands.
not_traced = torch._disable_dynamo


def active_processes() -> Any | None:
    """The process group of the DistributedDataParallel whose `forward` is running; None outside of one.

    Only inside of it do all processes make the same calls, so that they can wait for each other.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return _active_group()


@not_traced
def _active_group() -> Any | None:
    # A private name, which torch has had since 1.11; without it every process would start from its own batch, as it did before.
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return None if active is None else active.process_group


def refuse_shards(module: nn.Module) -> None:
    """Raise RuntimeError inside of a module that `fully_shard` has taken: it gathers parameters for `forward` anew.

    What `forward` writes into them would be lost, and be another process's own.
    """
    if dist.is_available() and dist.is_initialized():
        _refuse_shards(module)


@not_traced
def _refuse_shards(module: nn.Module) -> None:
    # Where no wrapper was made, the module is not even loaded. Its list of wrapped modules has a private name.
    states = sys.modules.get("torch.distributed._composable_state")
    for wrapped in list(getattr(states, "_module_state_mapping", ())):
        if type(wrapped).__name__.startswith("FSDP") and any(part is module for part in wrapped.modules()):
            raise RuntimeError(
                "ActNorms cannot start inside of fully_shard, which would forget their start: send the same first batch "
                "through the module in all processes, in training mode, before fully_shard"
            )


def moments(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation (D,) of every channel of x (B, D, …), over the batches of all active processes.

    None where these have fewer than two values of a channel. Only x of other processes may be empty or a single row.
    """
    rows = x.detach().movedim(1, -1).flatten(0, -2)
    processes = active_processes()
    if processes is None:
        return rows.mean(0), rows.std(0, correction=0)
    return _moments_of_all(rows, processes)


@not_traced
def _moments_of_all(rows: Tensor, processes: Any) -> tuple[Tensor, Tensor] | None:
    wide = rows.double()
    sums = torch.cat([wide.sum(0), wide.new_tensor([len(rows)])])
    dist.all_reduce(sums, group=processes)
    mean, count = sums[:-1] / sums[-1], sums[-1]
    squares = (wide - mean).square().sum(0)
    dist.all_reduce(squares, group=processes)
    if count < 2:
        return None
    return mean.to(rows.dtype), (squares / count).sqrt().to(rows.dtype)
