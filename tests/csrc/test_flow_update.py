"""The kernels of a small flow's training step, compiled for three generations: their registers, and what the bindings find."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
# Registers a thread, at most: nvcc 13.0 takes 101, 110 and 30 on sm_80. A block of 256 threads needs no more than 128 of them
# for two blocks to share a multiprocessor.
REGISTERS = {"update": 128, "gradients": 128, "batch": 40}


@pytest.mark.skipif(not Path(NVCC).exists(), reason="needs CUDA's compiler, nvcc")
@pytest.mark.parametrize("architecture", [90, *(pytest.param(a, marks=pytest.mark.long) for a in (75, 80, 100))])
def test_kernels_stay_in_their_registers_and_bindings_find_them(architecture: int, tmp_path: Path) -> None:
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    source, target = ROOT / "csrc" / "cuda" / "flow_update.cu", tmp_path / "flow_update.o"
    command = [NVCC, "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", code, "-c", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "warning" not in done.stderr, done.stderr
    entry = r"Compiling entry function '\w*flow_(\w+?)_kernel\w*'"
    pattern = entry + r".*?(\d+) bytes stack.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    kernels = re.findall(pattern, done.stderr, flags=re.S)
    assert sorted(name for name, *_ in kernels) == sorted(REGISTERS)
    for name, stack, spilled, registers in kernels:
        assert int(registers) <= REGISTERS[name] and int(stack) == int(spilled) == 0, (name, registers, stack, spilled)
    if architecture == 90:
        wanted, defined = symbols(bindings(tmp_path), "--undefined-only"), symbols(target, "--defined-only")
        assert len(wanted & defined) == 2 and not any("3glf6device" in name for name in wanted - defined)


def symbols(file: Path, which: str) -> set[str]:
    """The names that an object file wants, or defines."""
    said = subprocess.run(["nm", which, file], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in said.splitlines()}


def bindings(folder: Path) -> Path:
    """bindings_cuda_flow_update.cpp as setup.py compiles it, with warnings as errors."""
    home = Path(subprocess.run(["readlink", "-f", NVCC], capture_output=True, text=True).stdout.strip()).parents[1]
    home = home if (home / "include" / "cuda_runtime.h").exists() else Path("/usr/local/cuda")
    includes = [f"-I{path}" for path in (ROOT / "csrc", home / "include", Path(torch.__file__).parent / "include")]
    flags = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
    target, source = folder / "bindings.o", ROOT / "csrc" / "bindings_cuda_flow_update.cpp"
    versions = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    subprocess.run(["c++", *flags, *versions, *includes, "-c", source, "-o", target], check=True)
    return target
