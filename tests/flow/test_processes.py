"""Flows under DistributedDataParallel and FSDP2, in other people's loops, are those of one process on whole batches."""

import copy
from pathlib import Path

import pytest
import torch
import zuko
from first_batches import RUNS, start_together, trained
from nflows.distributions import StandardNormal
from nflows.flows import Flow as NflowsFlow
from nflows.transforms import CompositeTransform
from nflows_couplings import alternating
from several_processes import finished
from torch import nn
from training_loops import LOOPS, RATE

from glf_fast import ActNorm, CouplingFlow, GlowFlow, InvertibleLinear, SequentialFlow, accelerate, convert

from .conftest import coupling_step

BATCHES = 6


def nflows_flow() -> NflowsFlow:
    """A flow of nflows without data-dependent starts, with which it would not convert."""
    return NflowsFlow(CompositeTransform(list(alternating(4))), StandardNormal([4]))


def accelerated() -> NflowsFlow:
    flow = nflows_flow()
    assert accelerate(flow)
    return flow


def flows() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Flows in float64, fresh and converted, with batches (BATCHES, B, …)."""
    torch.manual_seed(0)
    image = (4, 3, 2)
    made = {
        "coupling": (CouplingFlow(4, 3, (8,)), (64, 4)),
        "permutation": (CouplingFlow(4, 2, (8,), linear="permutation"), (64, 4)),
        "vectors": (SequentialFlow([ActNorm(4), InvertibleLinear(4), ActNorm(4)], (4,)), (64, 4)),
        "reversible": (CouplingFlow(4, 3, (8,), reversible=True), (64, 4)),
        "images": (SequentialFlow([*coupling_step(4), *coupling_step(4)], image), (16, *image)),
        "glow": (GlowFlow((1, 4, 4), levels=2, steps=2, width=4, reversible=True), (16, 1, 4, 4)),
        "nflows": (convert(nflows_flow()), (64, 4)),
        "zuko": (convert(zuko.flows.NICE(4, transforms=2, hidden_features=(8,))), (64, 4)),
        "accelerated": (accelerated(), (64, 4)),
    }
    return {
        name: (flow.double(), 3 + 2 * torch.randn(BATCHES, *shape).double().cumsum(1) / shape[0] ** 0.5)
        for name, (flow, shape) in made.items()
    }


@pytest.mark.parametrize("loops", ["one", pytest.param("all", marks=pytest.mark.long)])
def test_all_processes_start_from_the_whole_batch_and_stay_equal(loops: str, tmp_path: Path) -> None:
    """Every flow in one loop, and three of them in all loops, which see modules and losses alone."""
    cases = flows()
    in_all = {"coupling", "glow", "accelerated"} if loops == "one" else cases
    runs = {name: [*RUNS] if name in in_all else ["plain"] for name in cases}
    torch.save((cases, runs), tmp_path / "cases.pt")
    finished(2, start_together, tmp_path)
    found = torch.load(tmp_path / "found.pt")
    for name, (flow, batches) in cases.items():
        started = copy.deepcopy(flow)
        started.log_prob(batches[0])
        _check(found[name, "uneven"], started.state_dict())
        for run in runs[name]:
            loop, low, _ = RUNS[run]
            expected = trained(flow, batches, LOOPS[loop], low)
            # A step of clipped gradients moves a weight by RATE at most, and bfloat16 has 8 digits.
            _check(found[name, run], expected, atol=BATCHES // 2 * RATE / 2**8 if low else None)


def _check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float | None = None) -> None:
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=atol, rtol=None if atol is None else 0.0)
