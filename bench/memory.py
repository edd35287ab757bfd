"""Peak memory of a training pass in a process of its own: `python -m bench.memory BACKEND STEPS [--reversible]`.

Prints JSON: bytes above what the process held before, with the parameters' gradients already there; how many of them a pass
for ∂x alone takes, without gradients of the parameters: activations, and the two matrices of each layer; bytes of the
parameters; and the seconds of the pass. Gradients that are being summed are as large as the parameters for each thread.

Linux only: the kernel's high-water mark of the resident set, which counts every allocation of every library. Blocks that
were freed must be out of the set by then, or the pass would use them unseen: set MALLOC_MMAP_THRESHOLD_ (see `ENVIRONMENT`).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

import glf_fast
from bench.check import why_wrong

__all__ = ["BATCH", "DIM", "ENVIRONMENT", "HIDDEN", "measure", "wrong_gradients"]

DIM, HIDDEN, BATCH = 64, (256, 256), 4096
CHECKED = 256  # rows whose gradients are compared with the reference's in float64
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns larger blocks at once


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _peak(work: Callable[[], object]) -> int:
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    work()
    return _resident("VmHWM") - before


def measure(backend: str, steps: int, reversible: bool) -> dict[str, float]:
    """One forward and backward of `steps` steps (D 64, H 256, 256, B 4,096).

    Raises:
        AssertionError: its gradients are not the reference's.
    """
    torch.manual_seed(0)
    flow = glf_fast.CouplingFlow(DIM, steps, HIDDEN, reversible=reversible)
    x = torch.randn(BATCH, DIM)
    seconds = 0.0

    def work() -> None:
        nonlocal seconds
        start = time.perf_counter()
        flow.log_prob(x).mean().backward()
        seconds = time.perf_counter() - start

    with glf_fast.use_backend(backend):
        for rows in (x[:64], x[:64]):  # loads libraries, makes the gradients and thread pools
            flow.log_prob(rows).mean().backward()
        peak, taken = _peak(work), seconds
        flow.requires_grad_(False)
        x.requires_grad_()
        flow.log_prob(x[:64]).mean().backward()
        activations = _peak(work)
        if wrong := wrong_gradients(flow.requires_grad_(), x.detach()):
            raise AssertionError(wrong)
    size = 4 * sum(p.numel() for p in flow.parameters())
    return {"peak_bytes": peak, "activation_bytes": activations, "parameter_bytes": size, "seconds": taken}


def wrong_gradients(flow: glf_fast.CouplingFlow, x: torch.Tensor) -> str:
    """What is wrong with the gradients of some rows, against the reference in float64, or ""."""
    rows = 0.5 + 1.5 * x[:CHECKED]  # off the minimum that the flow started from, where gradients are rounding
    found = _gradients(flow, rows)
    with glf_fast.use_backend("reference"):
        return why_wrong(found, _gradients(copy.deepcopy(flow).double(), rows.double()))


def _gradients(flow: glf_fast.CouplingFlow, x: torch.Tensor) -> list[torch.Tensor]:
    loss = -flow.log_prob(x).mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(flow.parameters()))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("backend", choices=("reference", "cpp"))
    parser.add_argument("steps", type=int)
    parser.add_argument("--reversible", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.backend, arguments.steps, arguments.reversible)))
