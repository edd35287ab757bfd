"""setup.py on machines unlike this one: an nvcc that is broken, or of another CUDA; sources packed where there is none."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# As in a torch with CUDA, which says where nvcc is; one without hides it.
SETUP = """
import runpy, sys
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = sys.argv.pop(1)
runpy.run_path("setup.py", run_name="__main__")
"""


def sources(folder: Path) -> Path:
    """What setup.py needs, with kernels that compile in a second."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    for name in ("glf_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("bindings.cpp", "bindings_linear.cpp", "bindings_cuda.cpp", "cpu/kernels.cpp", "cuda/linear.cu"):
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"int {path.stem}() {{ return 0; }}\n")
    return folder


@pytest.mark.parametrize(
    ("nvcc", "said"),
    [
        ("exit 1", "building without CUDA kernels: Command"),
        ("echo compute_20", "knows none of"),
        # One that lists architectures, and is of no CUDA that this torch takes.
        ("[ $1 = --list-gpu-arch ] && echo compute_80 || exit 1", "glf_fast._cpu and glf_fast._cuda not built"),
    ],
)
def test_the_processors_kernels_are_built_whatever_nvcc_does(tmp_path: Path, nvcc: str, said: str) -> None:
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(f"#!/bin/sh\n{nvcc}\n")
    compiler.chmod(0o755)
    folder = tmp_path / "sources"
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", SETUP, str(compiler.parents[1]), "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "MAX_JOBS": "1"}
    done = subprocess.run(command, cwd=sources(folder), env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and said in done.stderr, done.stdout + done.stderr
    assert "glf_fast._cpu not built" not in done.stderr
    assert [path.name for path in (folder / "glf_fast").glob("*.so")] == ["_cpu.abi3.so"]


def test_without_a_compiler_nothing_is_built_and_nothing_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    done = subprocess.run(command, cwd=sources(tmp_path), env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "glf_fast._cpu not built, the flows will be slow" in done.stderr, done.stderr
    assert not list((tmp_path / "glf_fast").glob("*.so"))


def test_a_source_distribution_has_all_sources(tmp_path: Path) -> None:
    """Also those of kernels that the machine which packs them cannot compile."""
    folder = tmp_path / "sources"
    folder.mkdir()
    sources(folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {str(path.relative_to(folder)) for path in (folder / "csrc").rglob("*") if path.is_file()}
    assert {"csrc/cuda/linear.cu", "csrc/bindings_cuda.cpp"} < wanted <= names
