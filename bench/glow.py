"""A training step of Glow on pixels: our flow, the same in textbook PyTorch and under torch.compile, and normflows' GlowBlock.

On a processor the peak memory of a step is that of a process of its own: `python -m bench.glow PROVIDER STEPS` prints it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import processor_clock
from bench.cases import Unrated
from bench.check import why_wrong
from bench.compiler import compiled
from bench.flows import Flow
from bench.libraries import LIBRARIES
from bench.libraries.density import Density
from bench.race import Clock, Job, Provider
from glf_fast import AffineCoupling, GlowFlow, Split, use_backend
from glf_fast.flow import GlowNetwork
from glf_fast.reference import log_normal

SMALL_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "4096"}  # what a coupling keeps is smaller than in `bench.memory`

__all__ = ["CASE", "MEMORY", "PROVIDERS", "GlowCase"]


@dataclass(frozen=True)
class GlowCase(Unrated):
    """K = `steps` steps at each of L levels, on grey images of 28 × 28 pixels; `memory`: the pass's peak, not its time."""

    steps: int
    levels: int = 2
    width: int = 64
    batch: int = 32
    memory: bool = False

    @property
    def name(self) -> str:
        """glow-K, of time or of memory."""
        return f"glow-{self.steps}" + ", memory" * self.memory

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": self.batch, "steps": self.steps, "width": self.width}

    def inputs(self, device: str = "cpu") -> tuple[Tensor, None]:
        """x (B, 1, 28, 28), and no context."""
        torch.manual_seed(1)
        return (0.2 + 1.2 * torch.randn(self.batch, 1, 28, 28)).to(device), None

    def flow(self, device: str = "cpu", *, reversible: bool = False) -> GlowFlow:
        """A flow after its data-dependent start, with parameters a little off their initial values."""
        torch.manual_seed(0)
        flow = GlowFlow((1, 28, 28), self.levels, self.steps, self.width, reversible=reversible)
        with torch.no_grad():
            flow(torch.randn(8, 1, 28, 28))
            for p in flow.parameters():
                p.add_(0.01 * min(1.0, 8 / self.steps) * torch.randn_like(p))
        return flow.to(device)


class Textbook(nn.Module):
    """The layers of a flow one by one, with networks of torch's layers: what a user would write."""

    def __init__(self, flow: GlowFlow) -> None:
        super().__init__()
        self.layers = flow.layers
        for layer in self.layers:
            if isinstance(layer, AffineCoupling):
                layer.conditioner = _TextbookNetwork(layer.conditioner)

    def log_prob(self, x: Tensor, context: None = None) -> Tensor:
        """log p (B,)."""
        logdet, factored_out = x.new_zeros(len(x)), []
        for layer in self.layers:
            x, more = layer(x)
            logdet = logdet + more
            if isinstance(layer, Split):
                x, z = x.split(layer.sizes, 1)
                factored_out.append(z.flatten(1))
        return log_normal(torch.cat([*factored_out, x.flatten(1)], 1)) + logdet


class _TextbookNetwork(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        assert isinstance(network, GlowNetwork)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        n: Any = self.network
        h = F.relu(n.first_norm(n.first(_with_ones(x)))[0])
        h = _with_ones(F.relu(n.second_norm(n.second(h))[0]))
        out = F.conv2d(h, torch.cat([n.last, n.edge.unsqueeze(1)], 1), n.bias, padding=1)
        return out * torch.exp(n.gain_factor * n.log_gain).view(-1, 1, 1)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1, *x.shape[2:])], 1)


def _density(name: str, case: GlowCase, device: str) -> Density:
    if name == "normflows":
        return _normflows(case)
    flow: Any = case.flow(device, reversible=name == "glf_fast reversible")
    if name in ("eager", "compile"):
        flow = Textbook(flow)
    log_prob = compiled(flow.log_prob) if name == "compile" else flow.log_prob
    return Density(flow, log_prob, lambda n, context: flow.sample(n))


def _normflows(case: GlowCase) -> Density:
    """A MultiscaleFlow of GlowBlocks as in its documentation: networks without ActNorm, bases that are not conditional."""
    import normflows as nf

    bases, merges, flows = [], [], []
    for i in reversed(range(case.levels)):  # the deepest level first
        channels, side = 4 * 2**i, 28 // 2 ** (i + 1)
        blocks = [nf.flows.GlowBlock(channels, case.width) for _ in range(case.steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        deepest = i == case.levels - 1
        bases.append(nf.distributions.DiagGaussian((channels if deepest else channels // 2, side, side)))
        merges += [] if deepest else [nf.flows.Merge()]
    model = nf.MultiscaleFlow(bases, flows, merges)
    with torch.no_grad():
        model.log_prob(torch.randn(8, 1, 28, 28), None)
    return Density(model, lambda x, _: model.log_prob(x, None), lambda n, _: model.sample(n)[0])


def _exact(case: GlowCase, device: str) -> list[Tensor]:
    """The loss and the gradients in float64."""
    flow = case.flow(device).double()
    with use_backend("reference"):
        loss = -flow.log_prob(case.inputs(device)[0].double()).mean()
        loss.backward()
    return [loss.detach(), *(p.grad for p in flow.parameters() if p.grad is not None)]


def _job(name: str, case: GlowCase, mode: str, clock: Clock) -> Job:
    if case.memory and not clock.GPU:
        return _elsewhere(name, case)
    torch.manual_seed(0)
    ours = name.startswith("glf_fast")
    flow = Flow(_density(name, case, clock.DEVICE), clock.DEVICE, "auto" if ours else "reference")

    def check(out: Tensor) -> str:
        if name == "normflows":  # another flow
            return "" if math.isfinite(float(out)) else "not finite"
        return why_wrong(flow.results(mode, out), _exact(case, clock.DEVICE))

    x, context = case.inputs(clock.DEVICE)
    info, rate = {"parameters": flow.parameters()}, ("images", case.batch)
    return Job(partial(flow.run, mode), check, (x, context), info, rate=rate)


def _elsewhere(name: str, case: GlowCase) -> Job:
    """The findings of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.glow", name, str(case.steps)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | SMALL_BLOCKS,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise AssertionError(done.stderr.strip()[-500:])
    info = json.loads(done.stdout)
    return Job(None, lambda _: "", seconds=[info.pop("seconds")], info=info)


PROVIDERS = {
    name: Provider(name, partial(_job, name), lambda case, mode, device, name=name: _why_not(name))  # type: ignore[misc]
    for name in ("glf_fast", "glf_fast reversible", "eager", "compile", "normflows")
}
CASE, MEMORY = GlowCase(8), GlowCase(32, memory=True)


def _why_not(name: str) -> str:
    return LIBRARIES[name].why_not() if name in LIBRARIES else ""


def main() -> None:
    """See the module's docstring."""
    name, steps = sys.argv[1], int(sys.argv[2])
    job = _job(name, GlowCase(steps), "train", processor_clock)
    for _ in range(2):  # loads libraries, makes the gradients and thread pools
        job.run()
    peak = processor_clock.peak_memory(job.run)
    seconds = processor_clock.call_times({name: job.run}, 0.5)[name]
    assert not isinstance(seconds, Exception)
    print(json.dumps({"peak_bytes": peak, "seconds": min(seconds.seconds)}))


if __name__ == "__main__":
    main()
