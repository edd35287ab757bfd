"""Whose flows are measured: ours, the same in plain PyTorch, and flows of the same size in other libraries.

A provider does the least that its library offers for such a flow; where that is less than we do, it is said beside it.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import glf_fast
from bench.cases import FlowCase, ImageCase
from bench.check import SEED, exact_flow, why_wrong
from bench.compiler import compiled

__all__ = [
    "COMPILED",
    "GRAPHED",
    "LIBRARIES",
    "MAKERS",
    "PLAIN",
    "Provider",
    "Replayed",
    "mlp",
    "provider",
    "why_missing",
]

LogProb = Callable[[Tensor, Tensor | None], Tensor]
Sample = Callable[[int, Tensor | None], Tensor]
LIBRARIES = ("normflows", "nflows", "zuko", "FrEIA")
COMPILED = ("compile", "reduce-overhead")
PLAIN = ("eager", *COMPILED)
GRAPHED = ", graphed"  # after a provider's name: its call is captured once as a CUDA graph, and replayed


@dataclass
class Provider:
    """One implementation of a case's flow."""

    name: str
    module: nn.Module
    log_prob: LogProb
    sample: Sample
    device: str
    backend: str | None = None  # of ours, while it runs
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        # Steps so short that what is timed stays what was checked; capturable where a graph may hold it.
        on_gpu = self.device != "cpu"
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-9, fused=True, capturable=on_gpu)

    def run(self, mode: str, x: Tensor, context: Tensor | None) -> Tensor:
        """One pass of `mode` over the rows x; returns what a user would look at."""
        if self.name == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # what the last pass returned may be overwritten
        with glf_fast.use_backend(self.backend) if self.backend else nullcontext():
            if mode == "log_prob":
                with torch.no_grad():
                    return self.log_prob(x, context)
            if mode == "sample":
                with torch.no_grad():
                    return self.sample(len(x), context)
            for p in self.module.parameters():
                p.grad = None
            loss = -self.log_prob(x, context).mean()
            loss.backward()
            if mode == "step":
                self.optimizer.step()
            return loss.detach()

    def why_wrong(self, mode: str, case: FlowCase, precision: str = "highest") -> str:
        """What is wrong with its results, or "": of our flow their values; of others' only shapes and that they are finite."""
        x, context = case.inputs(self.device)
        torch.manual_seed(SEED)
        out = self.run("train" if mode == "step" else mode, x, context)
        if self.backend:
            gradients = (p.grad for p in self.module.parameters() if mode in ("train", "step"))
            found = [out, *(g for g in gradients if g is not None)]
            return why_wrong(found, exact_flow(case, "train" if mode == "step" else mode, self.device), precision)
        shape = {"log_prob": x.shape[:1], "sample": x.shape}.get(mode, torch.Size())
        return "" if out.shape == shape and out.isfinite().all() else f"{tuple(out.shape)}, or not all finite"

    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)


class Replayed(Provider):
    """A provider's whole call as a CUDA graph, used as a training or sampling loop would: inputs are copied in, then replay.

    What it returns, and the gradients, lie in the graph's memory: the next replay overwrites them.
    """

    def __init__(self, made: Provider, capture: Callable[..., Any]) -> None:
        super().__init__(f"{made.name}{GRAPHED}", made.module, made.log_prob, made.sample, made.device, made.backend)
        self.capture = capture  # bench.timing.Graph
        self.graphs: dict[str, tuple[tuple[Tensor, Tensor | None], Any]] = {}

    def run(self, mode: str, x: Tensor, context: Tensor | None) -> Tensor:
        """As `Provider.run`; captures at the first call of a mode."""
        given = None if mode == "sample" else x, context  # samples need no data
        if mode not in self.graphs:
            held = x.clone(), None if context is None else context.clone()
            self.graphs[mode] = held, self.capture(partial(super().run, mode, *held))
        held, graph = self.graphs[mode]
        for mine, theirs in zip(held, given, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        graph.replay()
        result: Tensor = graph.results[0]
        return result


def why_missing(name: str, case: FlowCase | ImageCase) -> str:
    """Why a library cannot be measured on a case, or ""."""
    if name in LIBRARIES and importlib.util.find_spec(name) is None:
        return f"{name} is not installed (glf_fast[bench] has it)"
    if name == "normflows" and isinstance(case, FlowCase) and case.context_dim:
        return "normflows' AffineCouplingBlock takes no context"
    return ""


def provider(name: str, case: FlowCase, training: bool, device: str = "cpu") -> Provider:
    """The implementation called `name`, data-dependent starts done.

    Raises:
        AssertionError: it is not of our flow's size: as many parameters within 10 %.
    """
    torch.manual_seed(0)
    made = MAKERS[name](case, device)
    made.module.to(device)
    if name in LIBRARIES:  # their data-dependent starts, which a single row would spoil
        made.run("log_prob", *replace(case, batch=256).inputs(device))
    # As a user would have it: evaluation mode without gradients, so that what can be kept between calls is kept.
    # Eager and compiled PyTorch assemble their matrices at each call, as every library does.
    made.module.train(training or name in PLAIN)
    # Of the two square matrices that hold L and U only the strict triangles count.
    ours = sum(p.numel() for p in case.flow().parameters()) - case.steps * case.dim * (case.dim + 1)
    if name in LIBRARIES and abs(made.parameters() / ours - 1) > 0.1:
        raise AssertionError(f"{name} has {made.parameters()} parameters where we have {ours}: not the same flow")
    return made


def mlp(widths: Sequence[int], *, zero_last: bool = False) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    if zero_last:
        nn.init.zeros_(layers[-2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(layers[-2].bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def _ours(case: FlowCase, device: str) -> Provider:
    flow = case.flow(device)
    return Provider("glf_fast", flow, flow.log_prob, lambda n, c: flow.sample(n, c), device, backend="auto")


def _eager(case: FlowCase, device: str) -> Provider:
    flow = case.flow(device)
    return Provider("eager", flow, flow.log_prob, lambda n, c: flow.sample(n, c), device, backend="reference")


def _compile(case: FlowCase, device: str, mode: str | None = None) -> Provider:
    flow = case.flow(device)
    log_prob = compiled(flow.log_prob, mode)
    inverse = compiled(flow.inverse, mode)

    def sample(n: int, context: Tensor | None) -> Tensor:
        return inverse(torch.randn(n, case.dim, device=device), context)[0]

    return Provider(mode or "compile", flow, log_prob, sample, device, backend="reference")


def _freia(case: FlowCase, device: str) -> Provider:
    """AllInOneBlock: actnorm and coupling, with a fixed permutation where we have a learned matrix."""
    import FrEIA.framework
    import FrEIA.modules

    C = case.context_dim
    inn = FrEIA.framework.SequenceINN(case.dim)
    for _ in range(case.steps):
        inn.append(
            FrEIA.modules.AllInOneBlock,
            subnet_constructor=lambda n_in, n_out: mlp((n_in, *case.hidden, n_out), zero_last=True),
            cond=0 if C else None,
            cond_shape=(C,) if C else None,
        )

    def conditions(context: Tensor | None) -> list[Tensor] | None:
        return None if context is None else [context]

    def log_prob(x: Tensor, context: Tensor | None) -> Tensor:
        z, logdet = inn(x, c=conditions(context))
        return logdet - 0.5 * z.square().sum(1) - 0.5 * case.dim * 1.8378770664093453

    def sample(n: int, context: Tensor | None) -> Tensor:
        return inn(torch.randn(n, case.dim, device=device), c=conditions(context), rev=True)[0]

    return Provider("FrEIA", inn, log_prob, sample, device)


def _normflows(case: FlowCase, device: str) -> Provider:
    """ActNorm, coupling, and a fixed shuffle where we have a learned matrix."""
    import normflows as nf

    passive, transformed = case.dim - case.dim // 2, case.dim // 2
    flows: list[Any] = []
    for _ in range(case.steps):
        net = nf.nets.MLP([passive, *case.hidden, 2 * transformed], init_zeros=True)
        flows += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(case.dim, mode="shuffle")]
        flows += [nf.flows.ActNorm(case.dim)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(case.dim, trainable=False), flows)
    return Provider("normflows", model, lambda x, c: model.log_prob(x), lambda n, c: model.sample(n)[0], device)


def _nflows(case: FlowCase, device: str) -> Provider:
    """ActNorm, LULinear and coupling: all that we do."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import ActNorm, AffineCouplingTransform, CompositeTransform, LULinear

    class Net(nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.layers = mlp((n_in + case.context_dim, *case.hidden, n_out), zero_last=True)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.layers(x if context is None else torch.cat([x, context], 1))

    mask = torch.zeros(case.dim)
    mask[case.dim - case.dim // 2 :] = 1
    transforms: list[nn.Module] = []
    for _ in range(case.steps):
        transforms += [ActNorm(case.dim), LULinear(case.dim, identity_init=True), AffineCouplingTransform(mask, Net)]
    flow = Flow(CompositeTransform(transforms), StandardNormal([case.dim]))

    def sample(n: int, context: Tensor | None) -> Tensor:
        # With a context, one sample for each of its rows: (n, 1, D).
        return flow.sample(n) if context is None else flow.sample(1, context)[:, 0]

    return Provider("nflows", flow, lambda x, c: flow.log_prob(x, context=c), sample, device)


def _zuko(case: FlowCase, device: str) -> Provider:
    """RealNVP: couplings alone, with masks that alternate."""
    import zuko

    flow = zuko.flows.RealNVP(case.dim, case.context_dim, transforms=case.steps, hidden_features=case.hidden)

    def sample(n: int, context: Tensor | None) -> Tensor:
        return flow().sample((n,)) if context is None else flow(context).sample()

    return Provider("zuko", flow, lambda x, c: flow(c).log_prob(x), sample, device)


MAKERS: dict[str, Callable[[FlowCase, str], Provider]] = {
    "glf_fast": _ours,
    "eager": _eager,
    "compile": _compile,
    "reduce-overhead": partial(_compile, mode="reduce-overhead"),
    "normflows": _normflows,
    "nflows": _nflows,
    "zuko": _zuko,
    "FrEIA": _freia,
}
