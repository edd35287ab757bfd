"""The pool of threads (csrc/cpu/pool.cpp) under load."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("flags", "arguments"), [(["-fsanitize=thread", "-g"], []), ([], ["forks"])], ids=["sanitizer", "forks"]
)
def test_every_task_is_done_once(flags: list[str], arguments: list[str], tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler is needed"
    program = str(tmp_path / "pool")
    sources = [str(Path(__file__).with_name("pool.cpp")), str(ROOT / "csrc" / "cpu" / "pool.cpp")]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    options = ["-std=c++17", "-O1", *warnings, *flags, f"-I{ROOT / 'csrc'}", "-pthread"]
    subprocess.run([compiler, *options, *sources, "-o", program], check=True)
    # The sanitizer's memory has fixed places, where some kernels put other things at random.
    fixed = ["setarch", "-R"]
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    done = subprocess.run([*fixed, program, *arguments], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "all right"), done.stdout + done.stderr
