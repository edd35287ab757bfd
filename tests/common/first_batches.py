"""Flows that start and train inside of DistributedDataParallel, in processes that import this module by its name."""

from __future__ import annotations

import copy
import gc
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import all_gather_object, barrier, destroy_process_group, get_rank, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_loops import LOOPS, Density, Loop, Wrap, alone

from glf_fast import CouplingFlow

__all__ = ["RUNS", "start_together", "trained"]

# A flow and the batches of all processes, by name.
Cases = dict[str, tuple[nn.Module, Tensor]]
# Name of a loop, whether in bfloat16, and options of DistributedDataParallel.
RUNS: dict[str, tuple[str, bool, dict[str, bool]]] = {
    "plain": ("plain", False, {"static_graph": True}),
    "lightning": ("lightning", False, {"find_unused_parameters": True}),
    "accelerate": ("accelerate", False, {"gradient_as_bucket_view": True}),
    "lightning, bf16": ("lightning", True, {}),
    "accelerate, bf16": ("accelerate", True, {}),
}


def trained(flow: nn.Module, batches: Tensor, loop: Loop, low: bool, wrap: Wrap = alone) -> dict[str, Tensor]:
    """The state of a copy of a flow after training; in several processes the states are equal, bit for bit, after each step."""
    density = Density(copy.deepcopy(flow))
    if low:
        density.float()
        batches = batches.float()
    for _ in loop(density, wrap, batches, low):
        if wrap is not alone:
            check_equal(density)
    return density.flow.state_dict()


def check_equal(module: nn.Module) -> None:
    """All processes have the same state, bit for bit."""
    digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in module.state_dict().values())).hexdigest()
    every: list[Any] = [None, None]
    all_gather_object(every, digest)
    assert len(set(every)) == 1


def start_together(folder: Path) -> None:
    """Train the flows in a folder in two processes, each on one half of every batch, and save what becomes of them."""
    cases: Cases
    runs: dict[str, list[str]]
    cases, runs = torch.load(folder / "cases.pt", weights_only=False)
    init_process_group("gloo")
    together(cases, runs, folder)
    sharded(cases)
    one_alone()
    # A wrapper that outlives its group, or a process that leaves before the other, may wait for ever.
    gc.collect()
    barrier()
    destroy_process_group()


def together(cases: Cases, runs: dict[str, list[str]], folder: Path) -> None:
    """The calls of both processes inside of DistributedDataParallel, in the runs of each flow."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, (flow, batches) in cases.items():
        mine = torch.stack([x.chunk(2)[get_rank()] for x in batches])
        for run in runs[name]:
            loop, low, options = RUNS[run]
            wrap = lambda module, options=options: DistributedDataParallel(module, **options)  # noqa: E731
            found[name, run] = trained(flow, mine, LOOPS[loop], low, wrap)
        whole = copy.deepcopy(flow)
        uneven = DistributedDataParallel(Density(whole))
        with torch.no_grad():  # one process has a single row, which has no variance of its own
            uneven((batches[0, :-1], batches[0, -1:])[get_rank()])
        check_equal(whole)
        found[name, "uneven"] = whole.state_dict()
    if get_rank() == 0:
        torch.save(found, folder / "found.pt")


def sharded(cases: Cases) -> None:
    """FSDP2 refuses to forget a start; after the same first batch in all processes it trains as one process does."""
    mesh = init_device_mesh("cpu", (2,))
    for name in ("coupling", "images", "glow", "nflows", "zuko", "accelerated"):
        flow, batches = cases[name]
        if name in ("coupling", "images", "glow"):
            fresh = Density(copy.deepcopy(flow))
            fully_shard(fresh, mesh=mesh)
            with pytest.raises(RuntimeError, match="send the same first batch"):
                fresh(batches[0].chunk(2)[get_rank()])
        mine, whole = Density(copy.deepcopy(flow)), Density(copy.deepcopy(flow))
        for density in (mine, whole):
            density(batches[0])
        fully_shard(mine, mesh=mesh)
        halves = [x.chunk(2)[get_rank()] for x in batches]
        for _ in zip(
            LOOPS["plain"](mine, alone, halves, False), LOOPS["plain"](whole, alone, batches, False), strict=True
        ):
            pass
        for key, parameter in mine.named_parameters():
            torch.testing.assert_close(parameter.full_tensor(), whole.get_parameter(key))


def one_alone() -> None:
    """A call of one process outside of DistributedDataParallel waits for nobody, and does not pass unnoticed."""
    rank = get_rank()
    flow, x = CouplingFlow(4, 2, (8,)), torch.randn(20, 4)
    early, wrapped = DistributedDataParallel(flow), DistributedDataParallel(copy.deepcopy(flow))
    if rank == 0:
        flow(x)
        early(x)
    else:
        with pytest.raises(RuntimeError, match="one process has given ActNorms their start by itself"):
            early(x)
    flow = CouplingFlow(4, 2, (8,))
    if rank == 0:  # before wrapping all is well: wrapping brings its values to the others
        flow(x)
    DistributedDataParallel(flow)(x + rank)
    check_equal(flow)
    assert wrapped.module.actnorm_initialized.sum() == 0
