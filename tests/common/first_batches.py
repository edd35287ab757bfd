"""ActNorms that start inside of DistributedDataParallel, in processes that import this module by its name."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import barrier, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from glf_fast import CouplingFlow, Flow

STEPS = 5


class Density(nn.Module):
    """−log p, the way in which DistributedDataParallel reaches a flow."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x)


def train(call: nn.Module, flow: Flow, x: Tensor) -> dict[str, Tensor]:
    """The state of a flow after a first batch and some steps."""
    optimizer = torch.optim.SGD(flow.parameters(), 1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        call(x).mean().backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in flow.state_dict().items()}


def start_together(rank: int, meeting: str, flows: Mapping[str, tuple[Flow, Tensor]], folder: str) -> None:
    """Train flows in two processes, each on one half of the batch, and save what becomes of them."""
    torch.set_num_threads(1)
    init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    together(rank, flows, folder)
    sharded(rank, flows)
    alone(rank)
    # A wrapper that outlives its group, or a process that leaves before the other, may wait for ever.
    gc.collect()
    barrier()
    destroy_process_group()


def together(rank: int, flows: Mapping[str, tuple[Flow, Tensor]], folder: str) -> None:
    """The calls of both processes inside of DistributedDataParallel."""
    for name, (flow, x) in flows.items():
        mine, whole = copy.deepcopy(flow), copy.deepcopy(flow)
        wrapped = DistributedDataParallel(Density(mine))
        torch.save(train(wrapped, mine, x.chunk(2)[rank]), f"{folder}/{name}-{rank}.pt")
        uneven = DistributedDataParallel(Density(whole))
        with torch.no_grad():  # one process has a single row, which has no variance of its own
            uneven((x[:-1], x[-1:])[rank])
        torch.save(whole.state_dict(), f"{folder}/{name}-uneven-{rank}.pt")


def sharded(rank: int, flows: Mapping[str, tuple[Flow, Tensor]]) -> None:
    """FSDP2 refuses to forget a start; after the same first batch in all processes it trains as one process does."""
    mesh = init_device_mesh("cpu", (2,))
    for name in ("coupling", "images", "converted"):
        flow, x = flows[name]
        if name != "converted":
            fresh = Density(copy.deepcopy(flow))
            fully_shard(fresh, mesh=mesh)
            with pytest.raises(RuntimeError, match="send the same first batch"):
                fresh(x.chunk(2)[rank])
        mine, whole = Density(copy.deepcopy(flow)), Density(copy.deepcopy(flow))
        for density in (mine, whole):
            density(x)
        fully_shard(mine, mesh=mesh)
        train(mine, mine.flow, x.chunk(2)[rank])
        train(whole, whole.flow, x)
        for key, parameter in mine.named_parameters():
            torch.testing.assert_close(parameter.full_tensor(), whole.get_parameter(key))


def alone(rank: int) -> None:
    """A call of one process outside of DistributedDataParallel waits for nobody, and does not pass unnoticed."""
    flow, x = CouplingFlow(4, 2, (8,)), torch.randn(20, 4)
    early, wrapped = DistributedDataParallel(flow), DistributedDataParallel(copy.deepcopy(flow))
    if rank == 0:
        flow(x)
        early(x)
    else:
        with pytest.raises(RuntimeError, match="one process has given ActNorms their start by itself"):
            early(x)
    if rank == 0:  # before wrapping all is well: wrapping brings its values to the others
        flow = CouplingFlow(4, 2, (8,))
        flow(x)
    else:
        flow = CouplingFlow(4, 2, (8,))
    DistributedDataParallel(flow)(x + rank)
    sums = [p.detach().sum() for p in flow.parameters()]
    gathered = [torch.zeros(len(sums)) for _ in range(2)]
    torch.distributed.all_gather(gathered, torch.stack(sums))
    assert torch.equal(*gathered)
    assert wrapped.module.actnorm_initialized.sum() == 0
