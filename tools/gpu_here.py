"""`make gpu-here`: the software of the GPU machine on a machine without a GPU, and what can be done with it beforehand.

    python tools/gpu_here.py                    # needs nvcc, Python 3.12, 6 GB of disk and the network; an hour on two cores
    python tools/gpu_here.py unpack ARCHIVE     # on the machine with the GPU

Makes an environment with that machine's Python and packages (gpu_here.txt) and, in it, in a copy of the working tree:

1. builds the extension, and loads both libraries in that torch;
2. runs `tools/gpu.py --rehearse`;
3. runs what the two calls of `tools/gpu.py` would run, over a stub GPU (stub_gpu.py): every test and benchmark, with real
   CUDA tensors, streams and graphs, and every kernel through Triton's own compiler and launcher for sm_90. A kernel that does
   not compile, or whose launch the launcher refuses, is an error. So is every exception but a wrong result;
4. packs the libraries, the compiled kernels, those of tuning included, and missing wheels: build/gpu-here/carry.tar.xz;
5. unpacks that in another folder and runs 3 again, which must not compile a single kernel.

All is in build/gpu-here, and the environment is made only once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import carry
import stub_gpu

__all__ = ["kernel_names", "main", "python_312"]

ROOT = Path(__file__).parent.parent
HOME = ROOT / "build" / "gpu-here"
VENV, TREE, AGAIN = HOME / "venv", HOME / "tree", HOME / "again"
ARCHIVE = HOME / "carry.tar.xz"
PYTHON = VENV / "bin" / "python"
PACKAGES = VENV / "lib" / "python3.12" / "site-packages"
WHEELS = (
    "tyro==1.0.17", "docstring-parser==0.18.0", "typeguard==4.6.1",
    "nflows==0.14", "normflows==1.7.3", "FrEIA==0.2", "zuko==1.6.0",  # whose flows run beside ours
)  # fmt: skip
TRAVELS = 64 << 20  # bytes that the archive and the repository may have together


def python_312() -> Path:
    """A Python 3.12: on the path, or one of pyenv's."""
    found = sorted((Path.home() / ".pyenv" / "versions").glob("3.12*/bin/python3.12"))
    if name := shutil.which("python3.12"):
        found.insert(0, Path(name))
    for python in found:
        code = "import sys; sys.exit(sys.version_info[:2] != (3, 12))"
        if (
            subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0
        ):  # a shim of pyenv's may not run
            return python
    sys.exit("there is no Python 3.12, which the GPU machine has: install it, for instance with `pyenv install 3.12`")


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    print(f"== {what}", flush=True)
    started = time.monotonic()
    yield
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


def call(*command: object, folder: Path = ROOT, environment: dict[str, str] | None = None) -> None:
    """Run a command, which must succeed."""
    if code := subprocess.run([str(part) for part in command], cwd=folder, env=environment).returncode:
        sys.exit(f"failed with {code}: {' '.join(map(str, command))}")


def make_environment() -> None:
    """The packages of the GPU machine, where they are not there yet, and wheels of what it has not."""
    wanted = (ROOT / "tools" / "gpu_here.txt").read_text()
    stamp = VENV / "made-of.txt"
    pip = [PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(VENV, ignore_errors=True)
        call(python_312(), "-m", "venv", VENV)
        call(*pip, "install", "--requirement", ROOT / "tools" / "gpu_here.txt")
        stamp.write_text(wanted)
    if len(list((HOME / "wheels").glob("*.whl"))) != len(WHEELS):
        call(*pip, "wheel", "--no-deps", "--wheel-dir", HOME / "wheels", *WHEELS)


def copy_sources(target: Path) -> int:
    """Make a folder hold the files that git knows or does not ignore, and what was built there; returns their bytes."""
    listing = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()}
    for old in (path for path in target.rglob("*") if path.is_file() and path.suffix != ".so"):
        inside = old.relative_to(target)
        if inside.parts[0] != "build" and str(inside) not in names:
            old.unlink()
    for name in names:
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file() or copy.stat().st_mtime != source.stat().st_mtime:
            shutil.copy2(source, copy)
    shutil.rmtree(target / "wheels", ignore_errors=True)
    return sum((ROOT / name).stat().st_size for name in names)


def build_libraries() -> list[Path]:
    """Both libraries as the GPU machine would build them, put aside; they load in its torch."""
    log, kept = HOME / "build.log", HOME / "libraries"
    for old in (TREE / "glf_fast").glob("*.so"):
        old.unlink()
    with log.open("w") as file:
        build = [str(PYTHON), "setup.py", "build_ext", "--inplace"]
        subprocess.run(build, cwd=TREE, stdout=file, stderr=subprocess.STDOUT, check=True)
    built = sorted((TREE / "glf_fast").glob("*.so"))
    if [path.name for path in built] != ["_cpu.abi3.so", "_cuda.abi3.so"]:
        sys.exit(f"built {[path.name for path in built]} alone: {log} says why")
    call(PYTHON, "tools/gpu_here_steps.py", "load", folder=TREE)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for path in built:
        shutil.copy2(path, kept)
    return sorted(kept.iterdir())


def link_for_stub(tree: Path) -> None:
    """Replace _cuda.abi3.so by the same code with the shared libcudart, whose place the stub takes."""
    objects = sorted(TREE.glob("build/temp*/csrc/bindings_cuda*.o")) + sorted(TREE.glob("build/temp*/csrc/cuda/*.o"))
    torch, cuda = PACKAGES / "torch" / "lib", PACKAGES / "nvidia" / "cu13" / "lib"
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-l:libcudart.so.13"]
    target = tree / "glf_fast" / "_cuda.abi3.so"
    target.unlink()
    call("c++", "-shared", *objects, f"-L{torch}", f"-L{cuda}", *libraries, "-o", target)


def over_stub(tree: Path, cache: Path) -> None:
    """What tools/gpu.py would run on the GPU machine, over the stub GPU."""
    link_for_stub(tree)
    library = stub_gpu.build(PACKAGES, HOME / "stub-gpu")
    environment = stub_gpu.environment(library, tree / "tools" / "stub") | {
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    call(PYTHON, "tools/gpu_here_steps.py", "run", HOME / "results", folder=tree, environment=environment)


def kernel_names(root: Path = ROOT) -> frozenset[str]:
    """Names of the functions that Triton compiles in kernels/; torch.compile has its own kernels."""
    text = "\n".join(path.read_text() for path in sorted((root / "kernels").glob("*.py")))
    return frozenset(re.findall(r"^@triton\.jit.*\ndef (\w+)", text, flags=re.MULTILINE))


def prove(names: frozenset[str], cache: Path) -> None:
    """Run all again in another folder, with nothing but what the archive has."""
    shutil.rmtree(AGAIN, ignore_errors=True)
    copy_sources(AGAIN / "tree")
    unpack = [PYTHON, "tools/gpu_here.py", "unpack", ARCHIVE]
    fresh = AGAIN / "cache"
    call(*unpack, folder=AGAIN / "tree", environment={**os.environ, "TRITON_CACHE_DIR": str(fresh)})
    before = carry.compiled(fresh, names)
    if len(before) != len(carry.compiled(cache, names)):
        sys.exit(f"{len(before)} kernels came out of the archive, and {len(carry.compiled(cache, names))} went in")
    over_stub(AGAIN / "tree", fresh)
    if new := {folder: about for folder, about in carry.compiled(fresh, names).items() if folder not in before}:
        told = "\n".join(json.dumps({"folder": folder.name} | about)[:300] for folder, about in new.items())
        sys.exit(f"{len(new)} kernels were compiled although the archive should have them all:\n{told}")
    print("   no kernel was compiled again", flush=True)


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1:2] == ["unpack"]:
        carry.main()
        return
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    if not shutil.which("nvcc"):
        sys.exit("there is no nvcc, CUDA's compiler: install the toolkit of CUDA 13.0")
    HOME.mkdir(parents=True, exist_ok=True)
    cache, names = HOME / "triton", kernel_names()
    with stage("environment of the GPU machine"):
        make_environment()
    with stage("extension"):
        size = copy_sources(TREE)
        libraries = build_libraries()
    with stage("rehearsal on the processor"):
        call(PYTHON, "tools/gpu.py", "--rehearse", "--out", HOME / "rehearsal", folder=TREE)
    with stage("rehearsal over the stub GPU"):
        shutil.rmtree(cache, ignore_errors=True)  # what is packed is what this tree launches, no more
        shutil.copytree(HOME / "wheels", TREE / "wheels")
        over_stub(TREE, cache)
    with stage("archive"):
        about = json.loads(subprocess.check_output([PYTHON, "tools/carry.py", "here"], cwd=TREE))
        number = carry.pack(
            ARCHIVE, libraries, sorted((HOME / "wheels").glob("*.whl")), cache, names, carry.Manifest(**about)
        )
        packed = ARCHIVE.stat().st_size
        print(f"   {number} kernels, {packed / 1e6:.1f} MB; the repository has {size / 1e6:.1f} MB", flush=True)
        if packed + size > TRAVELS:
            sys.exit(f"too much to travel: {(packed + size) / 2**20:.1f} of {TRAVELS >> 20} MiB")
    with stage("the same from the archive alone"):
        prove(names, cache)
    print(f"carry {ARCHIVE.relative_to(ROOT)} to the machine", flush=True)


if __name__ == "__main__":
    main()
