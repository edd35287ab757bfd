"""What runs of earlier versions were must stay what it is: presets, and a run's folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from glf_fast import evaluate, sample, train, use_backend
from glf_fast.training.config_files import load, preset_path, to_toml
from glf_fast.training.runs import read_metrics, read_scores

GOLDEN = Path(__file__).parent / "golden"
Call = Callable[..., None]


@pytest.mark.parametrize("name", sorted(path.stem for path in (GOLDEN / "presets").iterdir()))
def test_presets_mean_what_they_meant(name: str) -> None:
    assert to_toml(load(preset_path(name))) == (GOLDEN / "presets" / f"{name}.toml").read_text()


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A copy of the run that version 0.1.0 left."""
    return Path(shutil.copytree(GOLDEN / "run-0.1.0", tmp_path / "old"))


@pytest.mark.usefixtures("curves")
def test_an_old_run_goes_on_where_it_was_left(old_run: Path, call: Call) -> None:
    wanted = json.loads((GOLDEN / "run-0.1.0.json").read_text())
    with use_backend("reference"):
        call(train, "--config", old_run / "config.toml", "--epochs", "4", "--device", "cpu", "--out", old_run)
    records = read_metrics(old_run)
    got = [{key: r[key] for key in wanted["losses"][0]} for r in records if r["images"] > 3072 and "loss" in r]
    assert got == [pytest.approx(record, rel=1e-3) for record in wanted["losses"]]
    [*_, last] = [record["score"] for record in records if "score" in record]
    assert last["metric"] == "FD[tiny]" and last["value"] == pytest.approx(wanted["score"]["score"]["value"], rel=1e-3)


def test_an_old_run_is_sampled_and_scored(old_run: Path, tmp_path: Path, call: Call) -> None:
    before = read_scores(old_run)
    assert before[0]["samples"]["precision"] is before[0]["reconstructions"]["recall"] is None
    call(sample, old_run, "--n", "4", "--out", tmp_path / "four.png")
    call(evaluate, old_run)
    after = read_scores(old_run)
    assert len(after) == len(before) == 2, "each new score is in the place of the old one"
    assert after[-1]["samples"]["value"] == pytest.approx(before[0]["samples"]["value"], rel=1e-3)
    assert "sampling protocol" in (old_run / "report.html").read_text()
