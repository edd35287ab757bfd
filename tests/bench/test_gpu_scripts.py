"""The scripts that the GPU calls run: what ncu says in numbers, which data a training run finds."""

import gzip
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from glf_fast import train
from glf_fast.data.idx import FASHION_MNIST

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    """A script of tools/ as a module."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module


STALLS = {
    "long_scoreboard": "3.75",
    "barrier": "1,200.5",
    "wait": "0",
    "branch_resolving": "n/a",
    "math_pipe_throttle": "0.5",
}


def raw_page() -> str:
    """As `ncu --import FILE --csv --page raw` prints it: progress, names, units, and a row a kernel."""
    about = {"ID": "0", "Kernel Name": "flow_kernel(float *)", "Block Size": "(128, 1, 1)", "Grid Size": "(16, 1, 1)"}
    numbers = {
        "gpu__time_duration.sum": ("us", "14.56"), "launch__registers_per_thread": ("register/thread", "168"),
        "lts__t_bytes.sum": ("Mbyte", "3.1"), "smsp__inst_executed.sum": ("inst", "1,234,567"),
        "smsp__issue_active.avg.pct_of_peak_sustained_active": ("%", "12.5"), "some__other.metric": ("", "1"),
    }  # fmt: skip
    stalls = {
        f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio": ("inst", v) for name, v in STALLS.items()
    }
    columns = {name: ("", value) for name, value in about.items()} | numbers | stalls
    quoted = [",".join(f'"{cell}"' for cell in row) for row in (columns, *zip(*columns.values(), strict=True))]
    return "\n".join(["==PROF== Connected to process 1", *quoted[:2], quoted[2], ""])


def test_key_numbers_of_ncu(script) -> None:
    (kernel,) = script("gpu_profile").key_numbers(raw_page())
    assert kernel == {
        "kernel": "flow_kernel(float *)", "grid": "(16, 1, 1)", "block": "(128, 1, 1)", "duration": "14.56 us",
        "registers": "168 register/thread", "bytes of L2": "3.1 Mbyte", "instructions": "1.23457e+06 inst",
        "issue slots used": "12.5 %",
        "warps waiting for": {"barrier": 1200.5, "long_scoreboard": 3.75, "math_pipe_throttle": 0.5},
    }  # fmt: skip
    assert script("gpu_profile").key_numbers("==ERROR== no kernels were profiled\n") == []


def test_a_training_run_takes_the_data_that_are_there(script, tmp_path, monkeypatch, fashion_mnist_dir) -> None:
    monkeypatch.setenv("GLF_FAST_CACHE", str(tmp_path / "cache"))
    preset_for = script("gpu_train").preset_for
    assert preset_for(tmp_path / "nothing")[0] == "smoke"
    for name in (file.name for file in FASHION_MNIST.files):
        source = next(path for path in (fashion_mnist_dir / f"{name}.gz", fashion_mnist_dir / name) if path.is_file())
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / "data")
    assert preset_for(tmp_path / "data") == ("fashion-mnist", ["--data-dir", str(tmp_path / "data")])
    for path in (tmp_path / "data").iterdir():  # not Fashion-MNIST's, and not MNIST's
        path.write_bytes(gzip.compress(b"wrong"))
    assert preset_for(tmp_path / "data")[0] == "smoke"


def test_a_training_run_ends_in_time_with_its_speed_and_scores(script, tmp_path, monkeypatch) -> None:
    """Training has what the start and the scores leave of the time; here it then gets half a second of its five."""
    gpu_train = script("gpu_train")

    def train_here(command: list[str]) -> SimpleNamespace:
        at = command.index("--max-minutes") + 1
        assert command[:3] == [sys.executable, "-m", "glf_fast.train"] and command[at] == f"{5 / 60:.3f}"
        monkeypatch.setattr(sys, "argv", [*command[2:at], "0.008", *command[at + 1 :]])
        train.main()
        return SimpleNamespace(returncode=0)

    monkeypatch.setenv("GLF_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_train, "subprocess", SimpleNamespace(run=train_here))
    options = ["--seconds", "30", "--data", tmp_path / "nothing", "--run", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["gpu_train.py", *map(str, [tmp_path, *options])])
    with pytest.raises(SystemExit) as end:
        gpu_train.main()
    assert end.value.code == 0
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["preset"] == "smoke" and found["images"] > 0 and found["images_per_second"] > 0
    assert [score["settings"]["extractor"] for score in found["scores"]] == ["tiny"]
    assert (tmp_path / "samples.png").stat().st_size > 0
