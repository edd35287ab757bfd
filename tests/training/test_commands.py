"""train, sample and evaluate as their users see them."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import glf_fast
from glf_fast import evaluate, sample, train
from glf_fast.errors import UserError
from glf_fast.training import checkpoint, runs
from glf_fast.training.config import with_table
from glf_fast.training.config_files import load, preset_path
from glf_fast.training.pictures import draw

Call = Callable[..., None]


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# -- a run ----------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_all_that_was_promised(smoke: Path) -> None:
    assert load(smoke / "config.toml") == load(preset_path("smoke"))
    seen = [record["images"] for record in lines(smoke)]
    assert seen == sorted(seen) and seen[-1] == 4 * 12 * 128
    for kind in ("samples", "reconstructions", "interpolations"):
        pictures = sorted((smoke / kind).iterdir())
        assert [path.name for path in pictures] == ["000003072.png", "000006144.png"]
        for path in pictures:
            assert pixels(path).std() > 1
    assert list((smoke / "tensorboard").iterdir())
    assert {path.name for path in (smoke / "checkpoints").iterdir()} == {"best", "last"}


def test_the_final_scores_carry_their_protocol(smoke: Path) -> None:
    [score] = json.loads((smoke / "scores.json").read_text())
    samples = score["samples"]
    assert samples["metric"] == "FD[tiny]" and samples["interval"][0] < samples["value"] < samples["interval"][1]
    assert samples["kid"] and set(samples["floors"]) == {"train/train", "train/test"}
    assert samples["protocol"]["reference"]["name"] == "digits" and samples["protocol"]["n"] == 180
    assert samples["protocol"]["sampling"]["checkpoint"]["name"] == "best"
    assert score["reconstructions"]["protocol"]["sampling"]["images"] == "test"
    assert score["samples"]["value"] > 2 * samples["floors"]["train/test"], "48 steps do not make a perfect model"


def test_the_best_checkpoint_has_the_lowest_score(smoke: Path) -> None:
    scored = [record for record in lines(smoke) if "score" in record]
    assert len(scored) == 2
    best = min(scored, key=lambda record: record["score"]["value"])  # type: ignore[index]
    state = checkpoint.read_state(smoke / "checkpoints" / "best")
    assert (state["images"], state["score"]) == (best["images"], best["score"])


def test_the_report_is_one_page_that_needs_nothing_else(smoke: Path) -> None:
    page = (smoke / "report.html").read_text()
    assert "$" not in re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"<(script|link|iframe)", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert page.count('src="data:') == 3
    assert page.count("<svg") == 1 and "currentColor" in page
    assert "FD[tiny]" in page and "finished" in page and "prefers-color-scheme: dark" in page


def test_a_finished_run_says_so_and_tells_its_scores_again(
    run: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    call(train, "--preset", "smoke", "--out", run)
    text = capsys.readouterr()
    assert "is finished (6,144 images)" in text.err
    assert "FD[tiny]" in text.out and "report.html" in text.out
    assert before == {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}


@pytest.mark.usefixtures("curves")
def test_a_finished_run_goes_on_when_given_more_epochs(run: Path, call: Call) -> None:
    call(train, "--preset", "smoke", "--out", run, "--epochs", "6")
    assert lines(run)[-1]["epoch"] == 6.0
    assert runs.read_config(run).epochs == 6
    assert len([record for record in lines(run) if record.get("finished")]) == 2
    assert "Samples during training" in (run / "report.html").read_text()


def test_a_folder_with_another_run_is_left_alone(run: Path, call: Call) -> None:
    with pytest.raises(UserError) as error:
        call(train, "--preset", "smoke", "--out", run, "--flow.steps", "3", "--seed", "1", "--epochs", "9")
    assert "holds a run with other settings in its config.toml (seed = 0, now 1; flow.steps = 2, now 3)" in str(
        error.value
    )
    assert runs.read_config(run) == load(preset_path("smoke"))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, call: Call) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a run's folder"):
        call(train, "--preset", "smoke", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_folder_is_named_by_what_was_chosen(tmp_path: Path) -> None:
    base = load(preset_path("smoke"))
    flow = dataclasses.replace(base.model.flow, hidden=(8, 8))
    assert runs.default_folder(base, base, "smoke") == Path("runs/smoke")
    assert runs.default_folder(dataclasses.replace(base, epochs=9), base, "smoke") == Path("runs/smoke")
    changed = with_table(dataclasses.replace(base, seed=3), "flow", flow)
    assert runs.default_folder(changed, base, "smoke") == Path("runs/smoke-seed=3-flow.hidden=8x8")
    own = dataclasses.replace(base, data=dataclasses.replace(base.data, source="/some/where/" + 30 * "deep/"))
    name = runs.default_folder(own, base, "smoke").name
    assert re.fullmatch(r"smoke-[0-9a-f]{10}", name)


def test_a_model_without_periodic_scores_ends_with_the_last_as_the_best(tmp_path: Path, call: Call) -> None:
    call(train, "--preset", "smoke", "--out", tmp_path / "r", "--score.every", "0", "--epochs", "1", "--ema", "0")
    best, last = (load_file(tmp_path / "r" / "checkpoints" / name / "model.safetensors") for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in last)
    assert runs.read_scores(tmp_path / "r")


def test_a_time_limit_ends_a_run_with_scores(tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "smoke", "--out", tmp_path / "r", "--epochs", "100000"]
    call(train, *arguments, "--max-minutes", "0.001")
    images = lines(tmp_path / "r")[-1]["images"]
    assert 0 < images < 100000 * 12 * 128  # type: ignore[operator]
    assert "FD[tiny]" in capsys.readouterr().out
    call(train, *arguments, "--max-minutes", "0.001")
    assert "is finished" in capsys.readouterr().err
    more = checkpoint.read_state(tmp_path / "r" / "checkpoints" / "last")["minutes"] + 0.005
    call(train, *arguments, "--max-minutes", f"{more:.4f}")
    assert lines(tmp_path / "r")[-1]["images"] > images  # type: ignore[operator]


def test_print_config_prints_a_config_file(call: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call(train, "--preset", "smoke", "--flow.steps", "5", "--print-config")
    (tmp_path / "my.toml").write_text(capsys.readouterr().out)
    config = load(preset_path("smoke"))
    flow = dataclasses.replace(config.model.flow, steps=5)
    assert load(tmp_path / "my.toml") == with_table(config, "flow", flow)


def test_dry_run_tells_and_writes_nothing(
    call: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call(train, "--preset", "smoke", "--dry-run")
    text = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for part in ("1617 × 1 × 8 × 8", "12 steps an epoch", "encoder 7,040", "activations", "one step", "[flow]"):
        assert part in text
    total, parts = re.search(r"# parameters  ([\d,]+): (.*)", text).groups()  # type: ignore[union-attr]
    counts = [int(count.replace(",", "")) for count in re.findall(r"[\d,]*\d", parts)]
    assert int(total.replace(",", "")) == sum(counts)


def test_missing_weights_of_an_extractor_cost_only_its_scores(
    tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The FID Inception is fetched from a public mirror; behind a proxy that leads nowhere it cannot be.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    extractors = ["--score.extractors", "inception", "tiny"]
    call(train, "--preset", "smoke", "--out", tmp_path / "r", "--epochs", "1", *extractors)
    text = capsys.readouterr()
    assert text.err.count("no scores with inception: ") == 1
    assert [score["settings"]["extractor"] for score in runs.read_scores(tmp_path / "r")] == ["tiny"]
    with pytest.raises(UserError):
        call(evaluate, tmp_path / "r", "--extractor", "inception")
    with pytest.raises(UserError, match="no extractor 'tinny'; did you mean 'tiny'"):
        call(train, "--preset", "smoke", "--out", tmp_path / "s", "--score.extractors", "tinny")


@pytest.mark.parametrize(("option", "made"), [("--out", False), ("--data-dir", True)])
def test_folders_whose_name_is_no_text_are_refused(option: str, made: bool, tmp_path: Path, call: Call) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff"))
    if made:
        folder.mkdir()
    with pytest.raises(UserError, match=f"{option} '.*' is not UTF-8"):
        call(train, "--preset", "smoke", option, folder)
    assert folder.exists() == made


# -- sample, evaluate, from Python ----------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_how_many(smoke: Path, tmp_path: Path, call: Call) -> None:
    for n in (5, 700):
        call(sample, smoke, "--n", str(n), "--out", tmp_path / f"{n}.npy", "--temperature", "0.7")
    few, many = np.load(tmp_path / "5.npy"), np.load(tmp_path / "700.npy")
    assert many.shape == (700, 1, 8, 8) and many.dtype == np.uint8
    assert (few == many[:5]).all()
    assert (many[500:505] != few).any(), "the second chunk has noise of its own"
    call(sample, smoke, "--n", "5", "--out", tmp_path / "other.npy", "--temperature", "0.7", "--seed", "1")
    assert (np.load(tmp_path / "other.npy") != few).any()


def test_samples_as_a_grid_and_as_a_folder(smoke: Path, tmp_path: Path, call: Call) -> None:
    call(sample, smoke, "--n", "6", "--out", tmp_path / "grid.png", "--checkpoint", "last")
    call(sample, smoke, "--n", "6", "--out", tmp_path / "folder")
    assert min(pixels(tmp_path / "grid.png").shape) > 3 * 8
    images = [pixels(path) for path in sorted((tmp_path / "folder").iterdir())]
    assert len(images) == 6 and images[0].shape == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "0"], "n = 0 images"),
        (["--n", "0", "--towards", "1", "7"], "n = 0 images"),
        (["--n", "-1", "--towards", "1", "7"], "n = -1 images"),
        (["--temperature"], "--temperature needs one value or more"),
        (["--towards", "1", "7", "--temperature", "0.7"], "--temperature has no effect with --towards"),
        (["--towards", "1", "7", "--mode", "authors"], "--mode has no effect with --towards"),
        (["--towards", "1", "7", "--seed", "1"], "--seed has no effect with --towards"),
        (["--data-dir", "."], "--data-dir has no effect without --towards"),
        (["--n", str(10**18)], "more than any memory holds; draw fewer"),
        (["--n", "9" * 20], "must be an integer of 64 bits"),
        (["--n", "9" * 40], "must be an integer of 64 bits"),
        (["--temperature", "-1"], "temperature = -1.0"),
        (["--temperature", "nan"], "temperature = nan"),
        (["--out", "grid.jpg"], "must end in .png or .npy"),
        (["--checkpoint", "first"], "invalid choice 'first'"),
        (["--temprature", "1"], "did you mean '--temperature'?"),
        (["--mode", "author"], "GLF has no sampling mode 'author'; did you mean 'authors'?"),
    ],
)
def test_mistakes_in_sampling_are_named(arguments: list[str], message: str, smoke: Path, call: Call) -> None:
    with pytest.raises(UserError) as error:
        call(sample, smoke, *arguments)
    assert message in str(error.value)


def test_evaluate_adds_scores_and_replaces_its_own(run: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    [old] = runs.read_scores(run)
    call(evaluate, run, "--n", "60", "--mode", "authors")
    assert "FD[tiny] (authors)" in capsys.readouterr().out
    call(evaluate, run, "--n", "60", "--mode", "authors")
    first, second = runs.read_scores(run)
    assert first == old
    assert second["settings"]["mode"] == "authors" and second["samples"]["protocol"]["n"] == 60
    assert second["samples"]["value"] != old["samples"]["value"]
    assert "sampling protocol of GLF&#x27;s authors" in (run / "report.html").read_text()


def test_evaluate_repeats_the_final_scores(run: Path, call: Call) -> None:
    [old] = runs.read_scores(run)
    call(evaluate, run)
    [new] = runs.read_scores(run)
    assert new["samples"]["value"] == old["samples"]["value"]
    assert new["reconstructions"]["value"] == old["reconstructions"]["value"]


def test_a_checkpoint_opens_from_python(smoke: Path, tmp_path: Path, call: Call) -> None:
    model = glf_fast.GLF.from_pretrained(smoke / "checkpoints" / "best")
    images = draw(model, 5, seed=0)
    call(sample, smoke, "--n", "5", "--out", tmp_path / "s.npy")
    assert (np.load(tmp_path / "s.npy") == images.numpy()).all()


def test_mistakes_in_evaluating_are_named(smoke: Path, call: Call) -> None:
    with pytest.raises(UserError, match="n ≥ 2"):
        call(evaluate, smoke, "--n", "1")


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path, call: Call) -> None:
    arguments = ["--preset", "smoke", "--out", tmp_path / "r", "--precision", "bf16", "--device", "cuda"]
    call(train, *arguments, "--epochs", "2")
    call(train, *arguments, "--epochs", "4")
    assert lines(tmp_path / "r")[-1]["images"] == 4 * 12 * 128
