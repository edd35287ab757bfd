"""Peak memory of a training pass in a process of its own: `python -m bench.memory BACKEND STEPS [--reversible]`.

Prints the bytes above what the process held before, with the parameters' gradients already there, and the seconds of the
pass. Linux only: the kernel's high-water mark of the resident set, which counts every allocation of every library.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import glf_fast

__all__ = ["peak"]

DIM, HIDDEN, BATCH = 64, (256, 256), 4096


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def peak(backend: str, steps: int, reversible: bool) -> tuple[int, float]:
    """Extra bytes and seconds of one forward and backward of `steps` steps (D 64, H 256, 256, B 4,096)."""
    torch.manual_seed(0)
    flow = glf_fast.CouplingFlow(DIM, steps, HIDDEN, reversible=reversible)
    x = torch.randn(BATCH, DIM)
    with glf_fast.use_backend(backend):
        for rows in (x[:64], x[:64]):  # loads libraries, makes the gradients and thread pools
            flow.log_prob(rows).mean().backward()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        start = time.perf_counter()
        flow.log_prob(x).mean().backward()
        seconds = time.perf_counter() - start
    return _resident("VmHWM") - before, seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("backend", choices=("reference", "cpp"))
    parser.add_argument("steps", type=int)
    parser.add_argument("--reversible", action="store_true")
    arguments = parser.parse_args()
    print(*peak(arguments.backend, arguments.steps, arguments.reversible))
