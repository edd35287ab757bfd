"""The suites themselves, on small cases: they run, their JSON becomes pages and figures, and nothing wrong is timed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import glf_fast
from bench import assemble, fitting, flows, glow, on_processor, processor_clock, splines
from bench.assemble import PluCase
from bench.cases import COUPLING_MODES, FLOWS, FlowCase, SplineCase
from bench.check import CHUNK, exact_flow
from bench.elsewhere import Elsewhere
from bench.fitting import FitCase
from bench.libraries import LIBRARIES
from bench.memory import DIM, ENVIRONMENT, MemoryCase, wrong_gradients
from bench.neighbours import PROVIDERS, NeighboursCase
from bench.plots import draw
from bench.race import Clock, Job, Provider
from bench.results import read
from bench.tables import page
from bench.training import Step

ROOT = Path(__file__).parents[2]
SMALL = (
    "flow-sbi-sample-glf_fast or flow-sbi-sample-eager or flow-sbi-sample-normflows or grid-4-32-1-train or depth-2-train or "
    "depth-4-train-glf_fast or (64x48x4x4 and forward and not compile) or (memory and 8 and reversible) or "
    "linear-8-4-forward or linear-8-8-forward or (256x20 and inverse) or (64x12x16x16 and channels and train) or "
    "(4096x8-8-bins and not compile) or plu-5-8 or (grid-4-32-16-train and not FrEIA)"  # whose eager is made wrong
)


def test_the_suites_run_and_become_tables_and_figures_and_what_is_wrong_has_no_time(bench, tmp_path) -> None:
    done, written = bench(SMALL, "-p", "wrong_eager")
    assert done.returncode == 1 and " 1 failed" in done.stdout, done.stdout[-3000:]
    assert "eager is wrong in grid-4-32-16, train" in done.stdout and "is off by" in done.stdout
    # Pages and comparisons show the line. Ours next to it is right, and is timed.
    (line,) = (line for line in written["wrong"] if "is off by" in line)
    assert line.startswith("grid-grid-4-32-16-train-eager: ")
    rows = [row["extra_info"] for row in written["benchmarks"]]
    assert {row["provider"] for row in rows if row["case"] == "grid-4-32-16"} == {"glf_fast"}
    assert "normflows' AffineCouplingBlock takes no context" in done.stdout  # not in silence
    assert "CuPy needs a GPU" in done.stdout
    found = read(tmp_path / "bench.json")
    assert {r.suite for r in found.results} == {race.suite for race in on_processor.races()} - {
        "train_step",
        "fit",
        "glow",
        "convert",
        "neighbours",
        "two_moons",
    }
    assert {(r.mode, r.provider) for r in found.suite("assemble")} == {
        (mode, name) for mode in ("forward", "train") for name in ("glf_fast", "eager")
    }
    assert found.machine["quick"] and found.machine["threads"] == 1
    assert any("flow-sbi-sample-normflows: normflows' " in line for line in found.wrong)
    assert all(r.median > 0 for r in found.results)
    assert all(r.info["yardstick_s"] > 0 for r in found.results if r.suite != "memory")
    text = "\n".join(page(found))
    for words in ("### sbi, sample", "| depth-2, train |", "64x48x4x4 channels-last, forward", "of copy bandwidth"):
        assert words in text
    figures = draw(found, tmp_path)
    assert [path.stem for path in figures] == ["ratios", "batch", "depth", "linear"]
    for path in figures:
        assert found.machine["commit"] in path.read_text() and "torch" in path.read_text()


def test_a_whole_step() -> None:
    for name in ("glf_fast", "eager"):
        step = Step(name, "mnist", batch=8)
        assert step.check(losses := step.run()) == ""
        assert losses["loss"].isfinite()
    step = Step("glf_fast", "mnist", batch=8)
    step.exact[-1] *= 1.1
    assert "off by" in step.check(step.run())


def test_processes_at_once() -> None:
    found = PROVIDERS["glf_fast"].job(NeighboursCase("sbi", 2, seconds=0.05), "log_prob", processor_clock)
    assert found.call is None and len(found.seconds) >= 2 and min(found.seconds) > 0
    assert found.info["mean"] > 0 and found.info["share"] > 0 and found.info["worst"] >= 1
    with pytest.raises(AssertionError, match=r"usage: python -m bench\.elsewhere"):
        Elsewhere("glf_fast", "sbi", "nonsense").wait()


@pytest.mark.parametrize("name", ["glf_fast", "glf_fast, loop", "zuko"])
def test_runs_of_training(name: str) -> None:
    if name != "zuko" or importlib.util.find_spec("zuko"):
        made = job(fitting.PROVIDERS[name], FitCase("sbi", rows=600, epochs=2), "fit")
        assert made.why_wrong() == "" and made.rate == ("epochs", 2)


@pytest.mark.long
def test_what_grows_with_depth_is_gradients_where_activations_are_rebuilt() -> None:
    """README's claim: of 24 more steps the reversible backward keeps nothing, but their gradients as they are summed."""
    if not glf_fast.backends()["cpp"].startswith("ready"):
        pytest.skip("the processor kernels are not built here")
    shallow, deep, kept = (
        json.loads(
            subprocess.run(
                [sys.executable, "-m", "bench.memory", "cpp", *options],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for options in (("8", "--reversible"), ("32", "--reversible"), ("32",))
    )
    assert abs(deep["activation_bytes"] - shallow["activation_bytes"]) < 1 << 20
    more = deep["parameter_bytes"] - shallow["parameter_bytes"]
    assert deep["peak_bytes"] - shallow["peak_bytes"] == pytest.approx(more, rel=0.15)
    assert kept["activation_bytes"] > 24 * 4 * DIM * MemoryCase(32).batch  # every step's input
    assert kept["activation_bytes"] > 5 * deep["activation_bytes"]


class Wrong(glf_fast.CouplingFlow):
    """In float32."""

    def log_prob(self, x, context=None):
        return super().log_prob(x, context) * (1.1 if x.dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("kind", [glf_fast.CouplingFlow, Wrong])
def test_wrong_gradients_are_named(kind: type[glf_fast.CouplingFlow]) -> None:
    torch.manual_seed(0)
    flow, x = kind(4, 2, (8, 8)), torch.randn(64, 4)
    flow(x)
    assert wrong_gradients(flow, x) == ("result 0 is off by 1.0e-01" if kind is Wrong else "")


def job(provider: Provider, case: Any, mode: str, clock: Clock = processor_clock) -> Job:
    assert provider.why_not(case, mode, "cpu") == ""
    return provider.job(case, mode, clock)


@pytest.mark.parametrize("case", [PluCase(3, 5), PluCase(2, 20)])
@pytest.mark.parametrize("name", ["glf_fast", "eager"])
def test_assembled_layers_are_checked(name: str, case: PluCase) -> None:
    for mode, number in (("forward", 4), ("train", 5)):
        made = job(assemble.PROVIDERS[name], case, mode)
        assert len(found := made.run()) == number and made.why_wrong() == ""
        assert "off by" in made.check([1.1 * t for t in found])


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # normflows'
@pytest.mark.parametrize("name", [name for name in glow.PROVIDERS if name != "compile"])
def test_steps_of_glow(name: str) -> None:
    case = glow.GlowCase(1, width=8, batch=4)
    provider = glow.PROVIDERS[name]
    if provider.why_not(case, "step", "cpu"):
        return
    made = job(provider, case, "step")
    assert made.why_wrong() == ""
    if name != "normflows":  # which is another flow
        assert "off by" in made.check(1.1 * made.run())


@pytest.mark.parametrize("of", ["glf-mnist", "splines", "sbi-splines"])
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.filterwarnings("ignore:.*triangular_solve:UserWarning")  # nflows'
def test_a_library_s_flow_is_of_our_size(name: str, of: str) -> None:
    case = FLOWS[of]
    if importlib.util.find_spec(name) is None:
        assert name in LIBRARIES[name].why_not()
        return
    if name == "FrEIA" and case.bins:
        assert LIBRARIES[name].why_not(case) == "FrEIA 0.2 has no splines"
        return
    ours = sum(p.numel() for p in case.flow().parameters())
    for mode in ("log_prob", "sample", "train"):
        made = job(flows.PROVIDERS[name], case, mode)
        assert made.why_wrong() == "" and abs(made.info["parameters"] / ours - 1) < 0.3


def test_the_extra_installs_what_the_benchmarks_compare_with() -> None:
    """In the versions that the tests have."""
    extra = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("bench = "))
    versions = {line for line in (ROOT / "libraries.txt").read_text().splitlines() if line.split("==")[0] in LIBRARIES}
    assert len(versions) == len(LIBRARIES) and all(f'"{version}"' in extra for version in versions)


def test_the_suites_beside_conversion_ask_for_three_minutes_at_most() -> None:
    """Checks in float64, compilation, warm-up and long calls take more than as long again, and all of them twelve minutes."""
    races = [race for race in on_processor.races() if race.suite != "convert"]
    assert sum(race.seconds * len(race.providers) for race in races) <= 180


@pytest.mark.parametrize("name", [name for name in splines.PROVIDERS if name != "compile"])
def test_splines_are_checked_against_the_formulas_of_their_library(name: str) -> None:
    if name in LIBRARIES and importlib.util.find_spec(name) is None:
        return
    for mode in COUPLING_MODES:
        made = job(splines.PROVIDERS[name], SplineCase(16, 3, 8), mode)
        found = made.run()
        assert len(found) == 2 and made.check(found) == ""
        assert "off by" in made.check([1.1 * t for t in found])


@pytest.mark.parametrize("bins", [0, 4])
@pytest.mark.parametrize("context", [0, 3])
def test_float64_in_chunks_is_float64_at_once(context: int, bins: int) -> None:
    case = FlowCase("chunks", 4, (8,), 2, 2 * CHUNK + 5, context, bins)
    flow = case.flow().double()
    x, c = case.inputs()
    loss = -flow.log_prob(x.double(), None if c is None else c.double()).mean()
    expected = [loss.detach(), *torch.autograd.grad(loss, list(flow.parameters()))]
    for found, truth in zip(exact_flow(case, "train"), expected, strict=True):
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("bins", [0, 4])
@pytest.mark.parametrize("mode", ["log_prob", "sample", "train"])
def test_our_flow_is_checked_in_every_mode(mode: str, bins: int) -> None:
    made = job(flows.PROVIDERS["glf_fast"], FlowCase("tiny", 5, (16, 16), 2, 10, context_dim=3, bins=bins), mode)
    assert made.why_wrong() == ""
    made.inputs[-1].add_(1)  # the context
    assert "off by" in made.why_wrong()
