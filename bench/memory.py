"""Peak memory of a training pass against depth; on a processor in a process of its own: `python -m bench.memory BACKEND STEPS`.

Bytes above what the process held before, with the parameters' gradients already there; how many of them a pass for ∂x alone
takes, without gradients of the parameters: activations, and the two matrices of each layer; bytes of the parameters. On a
processor the seconds of the pass, too: printed as JSON. Gradients that are being summed are as large as the parameters for
each thread. D 64, two hidden layers of 256.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glf_fast
from bench import processor_clock
from bench.cases import Unrated
from bench.check import why_wrong
from bench.race import Clock, Job, Provider

__all__ = ["DIM", "ENVIRONMENT", "PROVIDERS", "MemoryCase", "measure", "wrong_gradients"]

DIM, HIDDEN = 64, (256, 256)
CHECKED = 256  # rows whose gradients are compared with the reference's in float64
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns larger blocks at once


@dataclass(frozen=True)
class MemoryCase(Unrated):
    """A flow of so many steps."""

    steps: int
    batch: int = 4096

    @property
    def name(self) -> str:
        """memory-K."""
        return f"memory-{self.steps}"

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": self.batch, "dim": DIM, "hidden": HIDDEN, "steps": self.steps}


def measure(backend: str, reversible: bool, case: MemoryCase, clock: Clock) -> Job:
    """One forward and backward, whose memory is in `info`."""
    torch.manual_seed(0)
    flow = glf_fast.CouplingFlow(DIM, case.steps, HIDDEN, reversible=reversible).to(clock.DEVICE)
    x = torch.randn(case.batch, DIM, device=clock.DEVICE)

    def work(rows: Tensor = x) -> None:
        with glf_fast.use_backend(backend):
            flow.log_prob(rows).mean().backward()

    def check(_: object) -> str:
        with glf_fast.use_backend(backend):
            return wrong_gradients(flow, x)

    for _ in range(2):  # loads libraries, makes the gradients and thread pools
        work(x[:64])
    peak = clock.peak_memory(work)
    flow.requires_grad_(False)
    x.requires_grad_()
    work(x[:64])
    activations = clock.peak_memory(work)
    flow.requires_grad_()
    x.requires_grad_(False)
    size = 4 * sum(p.numel() for p in flow.parameters())
    return Job(work, check, info={"peak_bytes": peak, "activation_bytes": activations, "parameter_bytes": size})


def wrong_gradients(flow: glf_fast.CouplingFlow, x: torch.Tensor) -> str:
    """Say what is wrong with the gradients of some rows, against the reference in float64, or ""."""
    rows = 0.5 + 1.5 * x[:CHECKED]  # off the minimum that the flow started from, where gradients are rounding
    found = _gradients(flow, rows)
    with glf_fast.use_backend("reference"):
        return why_wrong(found, _gradients(copy.deepcopy(flow).double(), rows.double()))


def _gradients(flow: glf_fast.CouplingFlow, x: torch.Tensor) -> list[torch.Tensor]:
    loss = -flow.log_prob(x).mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(flow.parameters()))]


def _job(backend: str, reversible: bool, case: MemoryCase, mode: str, clock: Clock) -> Job:
    """On a processor what a process of its own has found."""
    if clock.GPU:
        return measure(backend, reversible, case, clock)
    program = [sys.executable, "-m", "bench.memory", backend.replace("auto", "cpp"), str(case.steps)]
    program += ["--batch", str(case.batch)]
    root, environment = Path(__file__).parent.parent, os.environ | ENVIRONMENT
    flags = ["--reversible"] if reversible else []
    done = subprocess.run([*program, *flags], cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stderr.strip()[-500:])
    info = json.loads(done.stdout)
    return Job(None, lambda _: "", seconds=[info.pop("seconds")], info=info)


PROVIDERS = {
    name: Provider(name, partial(_job, backend, reversible))
    for name, backend, reversible in (
        ("glf_fast", "auto", False),
        ("glf_fast reversible", "auto", True),
        ("eager", "reference", False),
    )
}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("backend", choices=("reference", "cpp"))
    parser.add_argument("steps", type=int)
    parser.add_argument("--batch", type=int, default=MemoryCase.batch)
    parser.add_argument("--reversible", action="store_true")
    arguments = parser.parse_args()
    job = measure(
        arguments.backend, arguments.reversible, MemoryCase(arguments.steps, arguments.batch), processor_clock
    )
    start = time.perf_counter()
    job.run()
    seconds = time.perf_counter() - start
    if wrong := job.check(None):
        sys.exit(wrong)
    print(json.dumps(job.info | {"seconds": seconds}))


if __name__ == "__main__":
    main()
