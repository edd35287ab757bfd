"""The suites themselves, on small cases: they run, their JSON becomes pages and figures, and nothing wrong is timed."""

import importlib.util

import pytest
import torch

from bench.baselines import LIBRARIES, provider, why_missing
from bench.cases import FLOWS, FlowCase
from bench.check import CHUNK, exact_flow
from bench.plots import draw
from bench.results import read
from bench.tables import page
from bench.training import Step

SMALL = (
    "sbi-sample-glf_fast or sbi-sample-eager or sbi-sample-normflows or grid-4-32-1-train or depth-2-train or "
    "depth-4-train-glf_fast or (64x48x4x4 and forward and not compile) or (memory and 8) or "
    "linear-8-4-forward or linear-8-8-forward or (256x20 and inverse) or (64x12x16x16 and channels and train)"
)


def test_the_suites_run_and_become_tables_and_figures(bench, tmp_path) -> None:
    done = bench(SMALL)[0]
    assert done.returncode == 0, done.stdout[-3000:]
    assert "SKIPPED [1] bench/test_flow.py" in done.stdout and ": normflows" in done.stdout  # not in silence
    assert "CuPy needs a GPU" in done.stdout
    found = read(tmp_path / "bench.json")
    assert {r.suite for r in found.results} == {"flow", "grid", "depth", "coupling", "memory", "linear", "apply"}
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
        assert step.why_wrong() == ""
        assert step.run()["loss"].isfinite()
    step = Step("glf_fast", "mnist", batch=8)
    step.exact[-1] *= 1.1
    assert "off by" in step.why_wrong()


def test_what_is_wrong_fails_and_has_no_time(bench) -> None:
    """Ours next to it is right, and is timed."""
    done, written = bench("grid-4-32-1-train", "-p", "wrong_eager")
    assert done.returncode == 1
    assert "eager is wrong in grid-4-32-1, train" in done.stdout and "is off by" in done.stdout
    providers = {row["extra_info"]["provider"] for row in written["benchmarks"]}
    assert "glf_fast" in providers and "eager" not in providers


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.filterwarnings("ignore:.*triangular_solve:UserWarning")  # nflows'
def test_a_library_s_flow_is_of_our_size(name: str) -> None:
    case = FLOWS["glf-mnist"]
    if importlib.util.find_spec(name) is None:
        assert name in why_missing(name, case)
        return
    assert abs(provider(name, case, True).parameters() / provider("glf_fast", case, True).parameters() - 1) < 0.3
    for mode in ("log_prob", "sample", "train"):
        assert provider(name, case, True).why_wrong(mode, case) == ""


@pytest.mark.parametrize("context", [0, 3])
def test_float64_in_chunks_is_float64_at_once(context: int) -> None:
    case = FlowCase("chunks", 4, (8,), 2, 2 * CHUNK + 5, context)
    flow = case.flow().double()
    x, c = case.inputs()
    loss = -flow.log_prob(x.double(), None if c is None else c.double()).mean()
    expected = [loss.detach(), *torch.autograd.grad(loss, list(flow.parameters()))]
    for found, truth in zip(exact_flow(case, "train"), expected, strict=True):
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("mode", ["log_prob", "sample", "train"])
def test_our_flow_is_checked_in_every_mode(mode: str) -> None:
    case = FlowCase("tiny", 5, (16, 16), 2, 10)
    ours = provider("glf_fast", case, True)
    assert ours.why_wrong(mode, case) == ""
    ours.module.mlp_biases[-1].data[0, 0] += 0.3
    assert "off by" in ours.why_wrong(mode, case)
    provider.cache_clear()
