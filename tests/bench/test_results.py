"""Result files, their tables, and what is called slower."""

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compare import compare
from bench.report import DOCS, FOLDER, OVERVIEW, with_table
from bench.results import merge, read, stats, write
from bench.tables import NOT_MEASURED, page, worth_a_gpu

ROOT = Path(__file__).parents[2]
KEPT = sorted(FOLDER.glob("*/times.json"))


def measured(generator: random.Random, runs: int, slower: dict[int, float]) -> dict:
    """50 cases with 4 % noise a run and machine-wide swings of 30 %, which all providers share."""
    swings = [math.exp(generator.gauss(0, 0.3)) for _ in range(runs)]
    times = {}
    for case in range(50):
        ours = 1e-3 * slower.get(case, 1.0)
        times["flow", f"case{case}", "train"] = {
            name: [seconds * swing * math.exp(generator.gauss(0, 0.04)) for swing in swings]
            for name, seconds in (("glf_fast", ours), ("eager", 3e-3), ("FrEIA", 2e-3))
        }
    return times


@pytest.mark.parametrize("seed", range(5))
def test_what_became_slower_is_named_and_nothing_else(seed: int, made) -> None:
    generator = random.Random(seed)
    before = made(measured(generator, 3, {}))
    after = made(measured(generator, 2, {7: 1.4, 31: 1.6, 40: 0.5}))
    named = {change.key[1] for change in compare(before, after) if change.slower}
    assert {"case7", "case31"} <= named <= {"case7", "case31", *(f"case{i}" for i in range(50) if i != 40)}
    assert len(named) <= 3  # one of 50 unchanged ones may exceed three standard errors by chance


def test_noise_must_have_been_measured(made) -> None:
    once = made(measured(random.Random(0), 1, {}))
    with pytest.raises(ValueError, match="run once on each side"):
        compare(once, once)


def test_the_command_exits_with_1_when_something_is_slower(made, tmp_path) -> None:
    for name, runs, slower in (("a", 3, {}), ("b", 3, {}), ("c", 1, {3: 2.0})):
        write(made(measured(random.Random(runs), runs, slower)), tmp_path / f"{name}.json")

    def command(before: str, after: str) -> subprocess.CompletedProcess:
        files = [str(tmp_path / f"{name}.json") for name in (before, after)]
        return subprocess.run([sys.executable, "-m", "bench.compare", *files], cwd=ROOT, capture_output=True, text=True)

    assert command("a", "b").returncode == 0
    slower = command("a", "c")
    assert slower.returncode == 1
    assert next(line for line in slower.stdout.splitlines() if line.endswith("slower |")).startswith(
        "| flow case3 train"
    )
    once = command("c", "c")
    assert once.returncode == 1 and "noise is not known" in once.stderr


def test_runs_are_merged_and_suites_joined(made, tmp_path) -> None:
    flow, linear = ("flow", "a", "train"), ("linear", "b", "inverse")
    first, second = made({flow: {"glf_fast": [1.0], "eager": [2.0]}}), made({flow: {"glf_fast": [1.1], "eager": [2.1]}})
    whole = merge([first, second, made({linear: {"glf_fast": [3.0]}})])
    assert whole.groups()[flow]["glf_fast"].medians == [1.0, 1.1]
    assert whole.groups()[flow]["eager"].median == 2.0
    assert whole.groups()[linear]["glf_fast"].medians == [3.0]
    write(whole, tmp_path / "whole.json")
    assert read(tmp_path / "whole.json") == whole
    with pytest.raises(ValueError, match="commit"):
        merge([first, made({}, commit="def")])


def test_a_suite_without_a_table_of_its_own_gets_the_plain_one(made) -> None:
    text = "\n".join(
        page(made({("newest", "K 8, D 4", "inverse"): {"glf_fast": [1e-5, 2e-5], "cusolver": [3e-5, 5e-5]}}))
    )
    assert "## newest" in text
    assert "| K 8, D 4, inverse | 10 µs | 30 µs (3.00 (2.50 – 3.00) ×) |" in text


def test_processors_beside_gpus(made) -> None:
    def grid(**machine: str):
        found = made({("grid", "grid-4-32-1", "train"): {"glf_fast": [1e-4], "eager": [1e-3]}}, **machine)
        for result in found.results:
            result.info |= {"dim": 4, "hidden": [32, 32], "batch": 1}
        return found

    cpu, gpu = grid(), grid(gpu="H200")
    header, _, row = worth_a_gpu([cpu])
    assert header == "| D | H | batch | CPU (X, 2 cores): glf_fast | CPU (X, 2 cores): eager | GPU: glf_fast |"
    assert row == f"| 4 | 32 | 1 | 100 µs | 1.00 ms | {NOT_MEASURED} |"
    assert next(worth_a_gpu([cpu, gpu])).endswith("| GPU (H200): glf_fast | GPU (H200): eager |")


def test_stats_of_one_and_of_many() -> None:
    assert stats([2.0]) == {"min": 2.0, "q1": 2.0, "median": 2.0, "q3": 2.0, "max": 2.0, "rounds": 1}
    assert stats([3.0, 1.0, 2.0])["median"] == 2.0


@pytest.mark.parametrize("path", KEPT, ids=[path.parent.name for path in KEPT])
def test_pages_say_what_the_committed_results_say(path: Path) -> None:
    """`python -m bench.report --docs` was run after the results changed."""
    assert (DOCS / f"{path.parent.name}.md").read_text().startswith("\n".join(page(read(path))) + "\n")


def test_the_overview_says_what_the_committed_results_say() -> None:
    text = OVERVIEW.read_text()
    assert with_table(text, [read(path) for path in KEPT]) == text
