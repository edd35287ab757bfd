"""`python -m glf_fast.info`: versions, processor, GPU and backends of this installation, and the cost of missing backends."""

from __future__ import annotations

import platform

import torch

import glf_fast
from glf_fast import distributed
from glf_fast.errors import run_command
from glf_fast.files import cache_dir
from glf_fast.ops.backends import BACKENDS

__all__ = ["COSTS", "info"]

COSTS = {name: backend.cost for name, backend in BACKENDS.items()}


def info() -> dict[str, str]:
    """Versions, processor, GPU, backends and folders, each as one line of text."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (everything runs on the processor)"
    return {
        "glf_fast": glf_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": gpu,
        **{f"backend {name}": state for name, state in glf_fast.backends().items()},
        **{f"without {name}": _cost(name) for name, backend in BACKENDS.items() if backend.missing},
        "cache": str(cache_dir()),
    }


def _cost(name: str) -> str:
    """The cost of a missing backend on this machine, and the remedy."""
    if BACKENDS[name].device == "cuda" and not torch.cuda.is_available():
        return "no cost on this machine, because no GPU is visible"
    return f"{COSTS[name]}. To change this, {BACKENDS[name].remedy}"


def main() -> None:
    """Print all of it."""
    distributed.refuse_several()
    for name, value in info().items():
        print(f"{name:18} {value}")


if __name__ == "__main__":
    run_command(main)
