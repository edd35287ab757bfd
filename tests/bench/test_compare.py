"""What is called slower: measured noise, baselines that move by themselves, cases that are gone, machines that differ."""

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compare import OURS, compare, vanished, why_not
from bench.results import write

ROOT = Path(__file__).parents[2]
OTHERS = {"eager": 3e-3, "FrEIA": 2e-3, "compile": 1.5e-3, "zuko": 2.5e-3}
CASE = ("flow", "case7", "train")


def measured(generator: random.Random, runs: int, factors: dict, others: int = 2, noise: float = 0.04) -> dict:
    """50 cases with 4 % noise a run and machine-wide swings of 30 %, which all providers share.

    `factors`: (case, provider) → how many times as long it takes.
    """
    swings = [math.exp(generator.gauss(0, 0.3)) for _ in range(runs)]
    usual = {OURS: 1e-3, **dict(list(OTHERS.items())[:others])}
    return {
        ("flow", f"case{case}", "train"): {
            name: [
                seconds * factors.get((case, name), 1.0) * swing * math.exp(generator.gauss(0, noise))
                for swing in swings
            ]
            for name, seconds in usual.items()
        }
        for case in range(50)
    }


@pytest.mark.parametrize("others", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_what_became_slower_is_named_and_nothing_else(seed: int, others: int, made) -> None:
    generator = random.Random(seed)
    before = made(measured(generator, 3, {}, others))
    after = made(measured(generator, 2, {(7, OURS): 1.4, (31, OURS): 1.6, (40, OURS): 0.5}, others))
    changes = [change for change in compare(before, after) if change.provider == OURS]
    named = {change.key[1] for change in changes if change.slower}
    assert len(changes) == 50 and {"case7", "case31"} <= named and "case40" not in named
    assert len(named) <= 3  # one of 50 unchanged ones may exceed three standard errors by chance


@pytest.mark.parametrize("others", [2, 3, 4])
@pytest.mark.parametrize("factor", [5.0, 0.2])
def test_one_baseline_that_moves_hides_nothing_and_fakes_nothing(factor: float, others: int, made) -> None:
    """torch.compile falls back to eager, or a library gets faster."""
    generator = random.Random(1)
    moved = {(7, OURS): 1.3, (7, "eager"): factor, (9, "eager"): factor}
    before = made(measured(generator, 3, {}, others, noise=0.01))
    after = made(measured(generator, 3, moved, others, noise=0.01))
    changes = {(change.key[1], change.provider): change for change in compare(before, after)}
    assert changes["case7", OURS].slower and changes["case7", OURS].change == pytest.approx(0.3, abs=0.05)
    assert not changes["case9", OURS].moved
    assert {case for (case, name), change in changes.items() if name == "eager" and change.moved} >= {"case7", "case9"}
    assert changes["case9", "eager"].change == pytest.approx(factor - 1, rel=0.05)


def test_noise_must_have_been_measured(made) -> None:
    once = made(measured(random.Random(0), 1, {}))
    with pytest.raises(ValueError, match="run once on each side"):
        compare(once, once)


def test_a_run_without_a_time_is_left_out(made) -> None:
    """FrEIA failed in the first run, and everything was twice as slow in it."""
    times = {CASE: {OURS: [2.0, 1.0, 1.0], "FrEIA": [None, 2.0, 2.0], "eager": [6.0, 3.0, 3.0]}}
    (ours, *_) = compare(made(times), made(times))
    assert ours.provider == OURS and ours.change == pytest.approx(0.0)
    zero = {CASE: {OURS: [1.0, 1.0], "FrEIA": [0.0, 0.0]}}  # no time, whatever it is
    assert compare(made(zero), made(zero))[0].change == 0.0


def test_what_has_no_time_any_more_is_named(made) -> None:
    before = made(measured(random.Random(0), 3, {}))
    times = measured(random.Random(1), 3, {})
    del times[CASE][OURS], times["flow", "case9", "train"]
    assert vanished(before, made(times)) == [CASE, ("flow", "case9", "train")]
    assert vanished(made(times), before) == []


@pytest.mark.parametrize("machine", [{"cores": 64}, {"gpu": "H200"}, {"cpu": {"brand_raw": "Y"}}, {"threads": 1}])
def test_another_machine_is_refused(machine: dict, made) -> None:
    times = measured(random.Random(0), 2, {})
    assert why_not(made(times), made(times, torch="2.14.0")) == ""
    assert next(iter(machine)).replace("cpu", "processor") in why_not(made(times), made(times, **machine))


def test_the_command_says_it_and_exits_with_1(made, tmp_path) -> None:
    gone = measured(random.Random(4), 3, {})
    del gone[CASE][OURS]
    files = {
        "a": made(measured(random.Random(3), 3, {})),
        "same": made(measured(random.Random(5), 3, {}), torch="2.14.0"),
        "slower": made(measured(random.Random(1), 1, {(3, OURS): 2.0, (4, "eager"): 3.0})),
        "once": made(measured(random.Random(2), 1, {})),
        "gone": made(gone),
        "other": made(measured(random.Random(3), 3, {}), gpu="H200"),
    }
    files["gone"].wrong = ["glf_fast in case7, train: result 0 is off by 1.0e-01"]
    for name, results in files.items():
        write(results, tmp_path / f"{name}.json")

    def command(before: str, after: str) -> subprocess.CompletedProcess:
        paths = [str(tmp_path / f"{name}.json") for name in (before, after)]
        return subprocess.run([sys.executable, "-m", "bench.compare", *paths], cwd=ROOT, capture_output=True, text=True)

    same = command("a", "same")
    assert same.returncode == 0 and "torch 2.13.0 before, 2.14.0 after" in same.stdout
    slower = command("a", "slower")
    assert slower.returncode == 1
    named = [line for line in slower.stdout.splitlines() if line.endswith("slower |")]
    assert named[0].startswith("| flow case3 train") and not any("case4 " in line for line in named)
    assert "flow case4 train: the baseline eager moved by itself" in slower.stdout
    vanished = command("a", "gone")
    assert vanished.returncode == 1
    assert "flow case7 train: glf_fast has no time any more" in vanished.stdout and "is off by" in vanished.stdout
    once = command("once", "once")
    assert once.returncode == 1 and "noise is not known" in once.stderr
    other = command("a", "other")
    assert other.returncode == 1 and "different machines" in other.stderr
