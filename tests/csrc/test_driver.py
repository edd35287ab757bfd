"""The C++ kernels under the address and undefined-behaviour sanitizers, in every instruction set of this processor."""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DGLF_POISON", f"-I{ROOT / 'csrc'}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the driver names x86 instruction sets")
def test_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler is needed"
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), Path(__file__).with_name("driver.cpp")]

    def build(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        subprocess.run([compiler, *FLAGS, *SANITIZERS, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(build, sources)]
    program = str(tmp_path / "driver")
    subprocess.run([compiler, *SANITIZERS, *objects, "-o", program, "-pthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "all agree"), done.stdout + done.stderr
