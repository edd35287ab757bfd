"""The C++ kernels alone: under sanitizers in every instruction set of this processor, and as NEON code."""

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Under sanitizers GCC 12 takes a variable in its own avx512fintrin.h for uninitialised.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-maybe-uninitialized",
    "-DGLF_POISON",
    f"-I{ROOT / 'csrc'}",
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")


def run_driver(compiler: str, flags: Sequence[str], folder: Path, emulator: Sequence[str] = ()) -> None:
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), Path(__file__).with_name("driver.cpp")]

    def build(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *FLAGS, *flags, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(build, sources)]
    program = str(folder / "driver")
    subprocess.run([compiler, *flags, *objects, "-o", program, "-pthread"], check=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "all agree"), done.stdout + done.stderr


@pytest.mark.long  # compiling takes a minute
def test_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler is needed"
    run_driver(compiler, SANITIZERS, tmp_path)


@pytest.mark.long  # five minutes: everything is compiled again, and emulated
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not all(map(shutil.which, ARM)), reason="needs the packages g++-aarch64-linux-gnu and qemu-user")
def test_kernels_run_as_neon(tmp_path: Path) -> None:
    run_driver(ARM[0], ["-static"], tmp_path, ARM[1:])
