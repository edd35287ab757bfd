"""What a machine with a GPU is: GPU, driver, clocks, versions, Triton's key, backends.

    python tools/gpu_machine.py [--rehearse]

The clocks are read, never set. Triton's key decides whether kernels that were compiled elsewhere are used. The last line says
whether the extension is complete, or what of it must be built.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import subprocess

__all__ = ["COMPLETE", "main"]

COMPLETE = "the extension is complete"

QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="A GPU is not needed.")
    rehearse = parser.parse_args().rehearse
    from triton.runtime.cache import triton_key

    from glf_fast import backends
    from glf_fast.info import info

    print(f"Triton's key       sha256 {hashlib.sha256(triton_key().encode()).hexdigest()}")
    for name in ("triton", "cupy-cuda13x", "numpy"):
        try:
            print(f"{name:18} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name:18} is not installed")
    if not rehearse:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]
        print(subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip(), flush=True)
    for name, value in info().items():
        print(f"{name:18} {value}")
    state = backends()
    wanted = ("cpp",) if rehearse else ("cpp", "cuda")
    missing = [name for name in wanted if not state[name].startswith("ready") or "CuPy" in state[name]]
    print(f"to be built: {', '.join(missing)}" if missing else COMPLETE)


if __name__ == "__main__":
    main()
