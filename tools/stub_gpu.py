"""Runs a Python program on a machine without a GPU as if it had one, a stub that computes nothing.

    PYTHON tools/stub_gpu.py PROGRAM [ARGUMENT …]        or        PYTHON tools/stub_gpu.py -m MODULE [ARGUMENT …]

PYTHON must have a torch with CUDA. In the program, and in all processes that it starts, torch.cuda finds an H100: tensors are
made there, Triton compiles for sm_90 and launches through its real launcher, graphs are captured and replayed. Peaks of
memory are real, because torch's own allocator makes them. Results are not: no kernel runs, and a result is whatever the
memory held before. What a driver checks without computing is checked (stub/stub.h). Whether results are right is not
judged, in the GPU's tests and in the benchmark (stub/sitecustomize.py).

The stub is one shared library, loaded before all others ($LD_PRELOAD), whose functions take the places of those of libcuda,
libcudart, cuBLAS and NCCL. nvcc builds it in build/stub-gpu when it is missing or older than its sources. It cannot take
the place of a libcudart that was linked statically: of _cuda.abi3.so tools/gpu_here.py links another, and CuPy is absent.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["FOLDER", "build", "environment"]

STUB = Path(__file__).parent / "stub"
FOLDER = Path(__file__).parent.parent / "build" / "stub-gpu"
# What torch calls of these all succeeds. NVRTC is not among them, which compiles without a GPU.
PREFIXES = re.compile(
    r"(__cuda|cuda|cublas|cublasLt|cudnn|cusolverDn|cusolver|cusparse|curand|nccl|cupti|cu(?!File))[A-Z]"
)


def build(packages: Path, folder: Path = FOLDER) -> Path:
    """The library for the torch and the Triton in a folder of packages; built where it is missing or out of date."""
    library = folder / "libcuda.so.1"
    sources = sorted(STUB.glob("*.c"))
    inputs = [*sources, STUB / "stub.h", Path(__file__), packages / "torch" / "version.py"]
    if library.is_file() and library.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return library
    folder.mkdir(parents=True, exist_ok=True)
    headers = [f"-I{path}" for path in sorted((packages / "nvidia").glob("*/include"))]
    nvcc = ["nvcc", "-cudart", "none", "-Xcompiler", "-fPIC,-w,-O1", *headers]
    objects = [folder / f"{path.stem}.o" for path in sources]
    for source, target in zip(sources, objects, strict=True):
        subprocess.run([*nvcc, "-c", source, "-o", target], check=True)
    wanted = {
        name for path in (packages / "torch" / "lib").glob("lib*.so") for name in _symbols(path, "--undefined-only")
    }
    # Triton compiles this where it is used: no library says what it calls.
    driver = (packages / "triton" / "backends" / "nvidia" / "driver.c").read_text()
    wanted |= set(re.findall(r"\bcu[A-Z]\w+(?=\()", driver))
    own = {name for path in objects for name in _symbols(path, "--defined-only", "--extern-only")}
    rest = folder / "rest.c"
    lines = [f"int {name}(void) {{ return stub_succeed(); }}" for name in sorted(wanted - own) if PREFIXES.match(name)]
    rest.write_text("\n".join(["int stub_succeed(void);", *lines, ""]))
    new = folder / "libcuda.new"  # a process that runs may have the old one loaded
    link = ["-shared", "-Xlinker", "-soname,libcuda.so.1", "-ldl", "-lpthread"]
    subprocess.run([*nvcc, *objects, rest, *link, "-o", new], check=True)
    new.replace(library)
    return library


def _symbols(path: Path, *which: str) -> set[str]:
    """Names of symbols, without versions."""
    flags = ["--dynamic"] if path.suffix == ".so" else []
    listing = subprocess.run(["nm", *flags, *which, path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listing.splitlines() if line.strip()}


def environment(library: Path, stub: Path = STUB) -> dict[str, str]:
    """The environment of this process, for one that is to have the stub GPU; `stub` is of the tree whose files it runs."""
    folder = library.resolve().parent
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / library.name),
        "TRITON_LIBCUDA_PATH": str(folder),  # what Triton links its launchers with
        "PYTHONPATH": os.pathsep.join(filter(None, (str(stub), os.environ.get("PYTHONPATH")))),  # sitecustomize.py
        "PYTHONPYCACHEPREFIX": str(folder / "pycache"),  # sitecustomize.py changes what is compiled
        "PYTEST_ADDOPTS": f"--assert=plain {os.environ.get('PYTEST_ADDOPTS', '')}",  # and pytest must not, too
    }


def main() -> None:
    """See the module's docstring."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(f"{sys.executable} has no torch; the stub stands in for what a torch with CUDA calls")
    library = build(Path(spec.origin).parents[1])
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment(library))


if __name__ == "__main__":
    main()
