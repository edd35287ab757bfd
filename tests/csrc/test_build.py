"""setup.py on machines where something is missing or fails: the installation succeeds with what can be built."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
NVCC = {
    "fails": "echo compute_80 compute_90; [ $1 = --list-gpu-arch ]",  # it is there, but of another CUDA than torch
    "is broken": "exit 1",
    "is too old": "echo compute_35",
}


def build(folder: Path, nvcc: str) -> subprocess.CompletedProcess[str]:
    """Our setup.py over sources of one line each, with such an nvcc."""
    for name in ("csrc/cpu", "csrc/cuda", "glf_fast/presets", "kernels", "cuda/bin"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", folder)
    for name in ("bindings.cpp", "bindings_linear.cpp", "bindings_cuda.cpp", "cpu/dispatch.cpp", "cuda/linear.cu"):
        (folder / "csrc" / name).write_text("static int unused() { return 0; }\n")
    (folder / "cuda/bin/nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
    (folder / "cuda/bin/nvcc").chmod(0o755)
    # A torch without CUDA looks for none.
    code = "import runpy, sys, torch.utils.cpp_extension as extensions; extensions.CUDA_HOME = sys.argv.pop(1);"
    code += "runpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-c", code, str(folder / "cuda"), "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@needs_compiler
@pytest.mark.parametrize("nvcc", NVCC)
def test_an_nvcc_that_does_not_work_costs_its_own_library_alone(nvcc: str, tmp_path: Path) -> None:
    done = build(tmp_path, NVCC[nvcc])
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "glf_fast").glob("*.so")] == ["_cpu.abi3.so"], done.stderr
    assert nvcc == "is too old" or "glf_fast: " in done.stderr


def test_without_a_compiler_nothing_is_built_and_nothing_fails(tmp_path: Path, monkeypatch) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, "false")
    done = build(tmp_path, NVCC["is broken"])
    assert done.returncode == 0 and "glf_fast._cpu not built, the flows will be slow" in done.stderr, done.stderr
    assert not list((tmp_path / "glf_fast").glob("*.so"))
