"""The data-dependent start of ActNorms under DistributedDataParallel is that of the whole batch."""

from pathlib import Path

import torch
from first_batches import Density, start_together, train
from nflows.distributions import StandardNormal
from nflows.flows import Flow as NflowsFlow
from nflows.transforms import CompositeTransform
from nflows_couplings import alternating
from torch import multiprocessing

from glf_fast import ActNorm, CouplingFlow, InvertibleLinear, SequentialFlow, convert

from .conftest import coupling_step


def nflows_flow() -> NflowsFlow:
    """A flow of nflows without data-dependent starts, with which it would not convert."""
    return NflowsFlow(CompositeTransform(list(alternating(4))), StandardNormal([4]))


def test_all_processes_start_from_the_whole_batch_and_stay_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flows = {
        "coupling": (CouplingFlow(4, 3, (8,)), (64, 4)),
        "context": (CouplingFlow(4, 2, (8,), linear="permutation"), (64, 4)),
        "vectors": (SequentialFlow([ActNorm(4), InvertibleLinear(4), ActNorm(4)], (4,)), (64, 4)),
        "reversible": (CouplingFlow(4, 3, (8,), reversible=True), (64, 4)),
        "converted": (convert(nflows_flow()), (64, 4)),
        "images": (SequentialFlow([*coupling_step(4), *coupling_step(4)], (4, 3, 2)), (16, 4, 3, 2)),
    }
    cases = {
        name: (flow.double(), 3 + 2 * torch.randn(shape).double().cumsum(0)) for name, (flow, shape) in flows.items()
    }
    multiprocessing.spawn(start_together, (f"file://{tmp_path / 'meeting'}", cases, str(tmp_path)), nprocs=2)
    for name, (flow, x) in cases.items():
        states = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)]
        uneven = [torch.load(tmp_path / f"{name}-uneven-{rank}.pt") for rank in (0, 1)]
        started = {key: tensor.clone() for key, tensor in _started(flow, x).items()}
        expected = train(Density(flow), flow, x)
        for key in expected:
            assert torch.equal(states[0][key], states[1][key]) and torch.equal(uneven[0][key], uneven[1][key]), (
                name,
                key,
            )
            torch.testing.assert_close(states[0][key], expected[key])
            torch.testing.assert_close(uneven[0][key], started[key])


def _started(flow, x) -> dict[str, torch.Tensor]:
    """The state after the first batch; further calls change nothing."""
    flow(x)
    return flow.state_dict()
