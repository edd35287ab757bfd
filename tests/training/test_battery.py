"""Scores beyond the usual ones in a run: its settings, its files and its report."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from glf_fast import evaluate, train
from glf_fast.errors import UserError
from glf_fast.metrics import score_table
from glf_fast.training import runs
from glf_fast.training.config import check, default
from glf_fast.training.config_files import load, to_toml
from glf_fast.training.scoring import has_scores

Call = Callable[..., None]


def test_files_of_earlier_versions_mean_what_they_meant(tmp_path: Path) -> None:
    assert "scores" not in to_toml(default("glf"))
    file = tmp_path / "c.toml"
    file.write_text('[score]\nscores = ["fd", "prd", "is"]\n')
    assert load(file).score.scores == ("fd", "prd", "is")
    assert 'scores = ["fd", "prd", "is"]' in to_toml(load(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('scores = ["kid"]', "score.scores must contain fd, which decides which checkpoint is the best"),
        ('scores = ["fd", "prdd"]', "score.scores: there is no score 'prdd'; did you mean 'prd'"),
        (
            'extractors = ["vgg16"]\nscores = ["fd", "is"]',
            "score.scores: the score 'is' needs an extractor that classifies: tiny,",
        ),
        ('extractors = ["tiny", "tiny-cifar10"]', "the weights of 'tiny-cifar10' cannot be given to a run"),
        ('scores = "fd"', 'score.scores = "fd" must be a list of strings'),
    ],
)
def test_mistakes_in_settings_are_one_line(settings: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"[score]\n{settings}\n")
    with pytest.raises(UserError) as error:
        check(load(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_score_without_a_value_is_not_there_yet() -> None:
    numbers = [{"score": "is", "value": None}, {"score": "prd", "value": 0.5}, {"score": "prd", "value": None}]
    assert [has_scores([{"battery": numbers}], ["fd", name]) for name in ("is", "prd")] == [False, True]


def test_a_finished_run_is_given_more_scores(
    run: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(score_table, "STEPS", 5)
    log = (run / "metrics.jsonl").read_text()
    more = ["--preset", "smoke", "--out", run, "--score.scores", "fd", "is", "prd", "critic", "nearest"]
    capsys.readouterr()
    call(train, *more)
    printed = capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text().startswith(log), "nothing is trained"
    [first] = [score for score in runs.read_scores(run) if "battery" in score]
    numbers = {number["name"]: number for number in first["battery"]}
    expected = ["IS[tiny]", "F8[tiny]", "F1/8[tiny]", "critic", "closer than test[tiny]", "distance / test[tiny]"]
    assert list(numbers) == expected
    assert all(number["value"] is not None and number["real"] is not None for number in numbers.values())
    assert all(name in printed for name in expected) and numbers["critic"]["noise"] is not None
    picture = numbers["closer than test[tiny]"]["picture"]
    with Image.open(io.BytesIO(base64.b64decode(picture))) as png:
        assert png.width > png.height
    page = (run / "report.html").read_text()
    assert "More scores" in page and page.count(picture) == 1 and "Precision and recall of distributions" in page
    call(train, *more)
    assert "is finished" in capsys.readouterr().err

    call(evaluate, run, "--scores", "fd,msssim")
    [first] = [score for score in runs.read_scores(run) if "battery" in score]
    assert [number["name"] for number in first["battery"]] == ["1 − MS-SSIM"]
    assert "1 − MS-SSIM" in capsys.readouterr().out

    scores = json.loads((run / "scores.json").read_text())
    scores[-1]["battery"][0]["value"] = "<script>"
    (run / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(UserError, match="does not hold scores"):
        runs.read_scores(run)
