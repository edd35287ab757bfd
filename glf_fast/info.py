"""`python -m glf_fast.info`: what this installation can do, and what is missing for more."""

from __future__ import annotations

import platform

import torch

import glf_fast
from glf_fast.files import cache_dir

__all__ = ["info"]


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
        "cache": str(cache_dir()),
    }


if __name__ == "__main__":
    for name, value in info().items():
        print(f"{name:18} {value}")
