"""Runs a Python program on a machine without a GPU as if it had one, a stub that computes nothing.

    PYTHON tools/stub_gpu.py PROGRAM [ARGUMENT …]        or        PYTHON tools/stub_gpu.py -m MODULE [ARGUMENT …]

PYTHON must have a torch with CUDA. In the program, and in all processes that it starts, torch.cuda finds one H100: tensors
are made there, Triton compiles for sm_90 and launches through its real launcher, graphs are captured and replayed. Results
are whatever the memory held before: no kernel runs. What a driver checks without computing is checked: stub_gpu.c.

The stub is one shared library, loaded before all others ($LD_PRELOAD), whose functions take the places of those of libcuda,
libcudart, cuBLAS, … It is built by nvcc in build/stub-gpu when it is missing or older than its sources.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["build", "environment"]

SOURCE = Path(__file__).with_name("stub_gpu.c")
FOLDER = Path(__file__).parent.parent / "build" / "stub-gpu"
# Functions of these libraries that torch imports: all succeed. NVRTC is not among them, which compiles without a GPU.
PREFIXES = re.compile(r"(__cuda|cuda|cublas|cublasLt|cudnn|cusolverDn|cusolver|cusparse|curand|nccl|cupti|cu)[A-Z]")
REAL = re.compile(r"cuFile")


def build(python_folder: Path, folder: Path = FOLDER) -> Path:
    """The library, built where it is missing or older than its sources, for the torch in a folder of packages."""
    library, rest = folder / "libcuda.so.1", folder / "rest.c"
    torch = python_folder / "torch"
    if library.is_file() and library.stat().st_mtime > max(
        SOURCE.stat().st_mtime, Path(__file__).stat().st_mtime, (torch / "version.py").stat().st_mtime
    ):
        return library
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name for path in sorted((torch / "lib").glob("lib*.so")) for name in _symbols(path, "--undefined-only")}
    # Triton compiles this on the user's machine: no library lists what it calls.
    driver = (python_folder / "triton" / "backends" / "nvidia" / "driver.c").read_text()
    wanted |= set(re.findall(r"\bcu[A-Z]\w+(?=\()", driver))
    names = sorted(name for name in wanted if PREFIXES.match(name) and not REAL.match(name))
    nvcc = ["nvcc", "-cudart", "none", "-Xcompiler", "-fPIC,-w", f"-I{python_folder / 'nvidia' / 'cu13' / 'include'}"]
    own = folder / "own.o"
    subprocess.run([*nvcc, "-O1", "-c", SOURCE, "-o", own], check=True)
    missing = sorted(set(names) - _symbols(own, "--defined-only", "--extern-only"))
    lines = ["int stub_gpu_succeed(void);", *(f"int {name}(void) {{ return stub_gpu_succeed(); }}" for name in missing)]
    rest.write_text("\n".join(lines) + "\n")
    # Under another name first: a process that runs may have the old one loaded.
    new = folder / "libcuda.new"
    link = ["-shared", "-Xlinker", "-soname,libcuda.so.1", "-ldl", "-lpthread"]
    subprocess.run([*nvcc, own, rest, *link, "-o", new], check=True)
    new.replace(library)
    return library


def _symbols(path: Path, *which: str) -> set[str]:
    """Names of a library's symbols, without versions."""
    flags = ["--dynamic"] if path.suffix != ".o" else []
    listing = subprocess.run(["nm", *flags, *which, path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listing.splitlines() if line.strip()}


def environment(library: Path) -> dict[str, str]:
    """The environment of this process, for one that is to have the stub GPU."""
    return {
        **os.environ,
        "LD_PRELOAD": str(library.resolve()),
        "TRITON_LIBCUDA_PATH": str(library.resolve().parent),  # what Triton links its launchers with
    }


def main() -> None:
    """See the module's docstring."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(f"{sys.executable} has no torch: the stub stands in for what a torch with CUDA calls")
    library = build(Path(spec.origin).parents[1])
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment(library))


if __name__ == "__main__":
    main()
