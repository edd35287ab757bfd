"""Masked autoregressive flows as jobs: sbi's default estimator by ours, by plain PyTorch, and in nflows, zuko and flowjax."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.cases import FlowCase
from bench.flows import FLOWJAX, Flow, flow_job
from bench.libraries.density import Density
from bench.race import Clock, Job, Provider

__all__ = ["PROVIDERS"]


def _ours(case: FlowCase, device: str) -> Density:
    flow = case.flow(device)
    return Density(flow, flow.log_prob, flow.sample)


def _nflows(case: FlowCase) -> Density:
    """What sbi's `maf` builds."""
    from nflows import transforms
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow as NFlow

    layers: list[torch.nn.Module] = []
    for _ in range(case.steps):
        made = transforms.MaskedAffineAutoregressiveTransform(
            case.dim, case.hidden[0], case.context_dim, num_blocks=len(case.hidden) - 1, use_residual_blocks=False,
            activation=torch.tanh,
        )  # fmt: skip
        layers += [made, transforms.RandomPermutation(case.dim)]
    flow = NFlow(transforms.CompositeTransform(layers), StandardNormal([case.dim]))

    def sample(n: int, context: Tensor | None) -> Tensor:
        return flow.sample(1, context)[:, 0]  # one for each row

    return Density(flow, lambda x, c: flow.log_prob(x, context=c), sample)


def _zuko(case: FlowCase) -> Density:
    import zuko

    flow = zuko.flows.MAF(
        case.dim, case.context_dim, transforms=case.steps, hidden_features=case.hidden, activation=torch.nn.Tanh
    )
    return Density(flow, lambda x, c: flow(c).log_prob(x), lambda n, c: flow(c).sample())


def _library_job(make: Callable[[FlowCase], Density], case: FlowCase, mode: str, clock: Clock) -> Job:
    """Passes of a library's flow, checked for shapes and finite values alone."""
    torch.manual_seed(0)
    flow = Flow(make(case), clock.DEVICE)
    flow.module.train(mode in ("train", "step"))
    shape = {"log_prob": (case.batch,), "sample": (case.batch, case.dim)}.get(mode, ())

    def check(out: Tensor) -> str:
        right = out.shape == shape and out.isfinite().all()
        return "" if right else f"{tuple(out.shape)}, or not all finite"

    return flow.job(mode, case, clock.DEVICE, check)


def _why_not(name: str, case: FlowCase, mode: str, device: str) -> str:
    return "" if importlib.util.find_spec(name) else f"{name} is not installed (glf_fast[bench] has it)"


PROVIDERS: dict[str, Provider] = {
    **{name: Provider(name, partial(flow_job, name, _ours)) for name in ("glf_fast", "eager")},
    **{
        name: Provider(name, partial(_library_job, make), partial(_why_not, name))
        for name, make in {"nflows": _nflows, "zuko": _zuko}.items()
    },
    "flowjax": FLOWJAX,
}
