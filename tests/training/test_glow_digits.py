"""A flow on pixels from the command line: training, resuming, samples at several temperatures, other data."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from glf_fast import evaluate, sample, train
from glf_fast.data import load
from glf_fast.errors import UserError
from glf_fast.images import save_png
from glf_fast.metrics import subset
from glf_fast.training import runs
from glf_fast.training.config import DataConfig
from glf_fast.training.config_files import load as load_config
from glf_fast.training.config_files import preset_path
from glf_fast.training.splits import load_other
from glf_fast.training.trainer import Trainer

Call = Callable[..., None]


@pytest.mark.usefixtures("curves")
def test_a_run_and_what_can_be_done_with_it(tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    call(train, "--preset", "glow-digits", "--epochs", "2", "--model.steps", "1", "--out", run)
    assert "bits per dimension" in capsys.readouterr().out
    [score] = runs.read_scores(run)
    assert score["likelihood"]["value"] < 8 and score["likelihood"]["what"] == "exact"
    assert score["reconstructions"] is None and (run / "interpolations").is_dir()

    for temperatures in (("0", "0.5", "1"), ("0.5",)):
        call(sample, run, "--n", "6", "--temperature", *temperatures, "--out", tmp_path / f"{len(temperatures)}.npy")
    rows, row = (np.load(tmp_path / f"{n}.npy") for n in (3, 1))
    assert rows.shape == (18, 1, 8, 8) and (rows[6:12] == row).all() and (rows[0] == rows[5]).all()
    call(sample, run, "--n", "2", "--towards", "1", "7", "--out", tmp_path / "towards.npy")
    towards, ones = np.load(tmp_path / "towards.npy").reshape(2, 9, 1, 8, 8), load("digits", "test")
    assert (towards[:, 0] == ones.images[ones.labels == 1][:2].numpy()).all() and (towards[:, 8] != towards[:, 0]).any()
    with pytest.raises(UserError, match="no train images with label 12"):
        call(sample, run, "--towards", "1", "12")

    np.save(tmp_path / "black.npy", np.zeros((40, 1, 8, 8), np.uint8))
    capsys.readouterr()
    call(evaluate, run, "--n", "40", "--other-data", "digits", tmp_path / "black.npy")
    shares = re.findall(r"needs more bits than a test image with probability (\d\.\d{3})", capsys.readouterr().out)
    assert shares[0] == "0.500" != shares[1]


def test_a_conditional_run_samples_by_class(tmp_path: Path, call: Call) -> None:
    digits = load("digits", "train")
    file = tmp_path / "digits.npz"
    np.savez(file, x=digits.images[:200].numpy(), labels=digits.labels[:200].numpy())
    small = (
        "--model.steps",
        "1",
        "--epochs",
        "1",
        "--score.samples",
        "20",
        "--batch-size",
        "60",
        "--data.source",
        file,
    )
    run, conditional = tmp_path / "run", ("--preset", "glow-digits", "--model.conditional", *small)
    call(train, *conditional, "--dry-run")
    call(train, *conditional, "--out", run)
    assert "<h2>Classes</h2>" in (run / "report.html").read_text() and len(list((run / "classes").glob("*.png"))) == 1
    call(sample, run, "--n", "3", "--label", "4", "9", "--temperature", "0.5", "1", "--out", tmp_path / "of.npy")
    of = np.load(tmp_path / "of.npy").reshape(2, 2, 3, 1, 8, 8)
    call(sample, run, "--n", "2", "--label", "9", "--out", tmp_path / "nine.npy")
    assert (np.load(tmp_path / "nine.npy") == of[1, 1, :2]).all() and (of[0] != of[1]).any()
    call(sample, run, "--n", "2", "--towards", "1", "7", "--out", tmp_path / "towards.npy")
    assert np.load(tmp_path / "towards.npy").shape == (18, 1, 8, 8)
    for options, message in (
        (("--label", "12"), "has no class 12; its labels are 0, 1, 2"),
        (("--label", "1", "--mode", "authors"), "--mode has no effect with --label"),
        (("--label", "1", "--towards", "1", "7"), "--label has no effect with --towards"),
    ):
        with pytest.raises(UserError, match=message):
            call(sample, run, *options)

    np.savez(file, x=digits.images[:200].numpy(), labels=9 - digits.labels[:200].numpy())
    with pytest.raises(UserError, match="was trained on other data or labels than"):
        call(train, *conditional, "--out", run)
    np.savez(file, x=digits.images[:200].numpy())
    with pytest.raises(UserError, match=r"'glow' cannot be built for .*digits.npz: model.conditional needs a label"):
        call(train, *conditional, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    call(train, "--preset", "glow-digits", *small, "--out", tmp_path / "plain")
    with pytest.raises(UserError, match=r"this Glow has no classes, so --label cannot be used"):
        call(sample, tmp_path / "plain", "--label", "1")

    attributes = tmp_path / "attributes.csv"
    rows = [f"{place},{int(label == 3)},-1" for place, label in enumerate(digits.labels[:200].tolist())]
    attributes.write_text("\n".join(["place,three,never", *rows]))
    np.savez(file, x=digits.images[:200].numpy())
    command = (sample, tmp_path / "plain", "--n", "2", "--out", tmp_path / "more.npy", "--attribute")
    call(*command, "three", "--attributes", attributes)
    more = np.load(tmp_path / "more.npy").reshape(2, 9, 1, 8, 8)
    assert (more[:, 4] == subset(load(str(file), "test").images, 2).numpy()).all() and (more[:, 0] != more[:, 8]).any()
    for options, message in (
        (("three",), "--attribute needs the file that has it"),
        (("never", "--attributes", attributes), "none of the training images have this attribute"),
        (("three", "--attributes", attributes, "--towards", "1", "7"), "--attribute has no effect with --towards"),
    ):
        with pytest.raises(UserError, match=message):
            call(*command, *options)
    with pytest.raises(UserError, match="--attributes has no effect without --attribute"):
        call(sample, tmp_path / "plain", "--attributes", attributes)


def test_other_data_are_loaded_with_the_options_that_they_take(tmp_path: Path) -> None:
    """The run has the options of a folder of images, --data-dir too; images of another size are resized to the model's."""
    (tmp_path / "folder").mkdir()
    for i in range(40):
        save_png(tmp_path / "folder" / f"{i}.png", torch.full((1, 12, 12), i, dtype=torch.uint8))
    (tmp_path / "folder" / "notes.png").write_text("no image")
    np.save(tmp_path / "black.npy", np.zeros((40, 1, 8, 8), np.uint8))
    config = DataConfig(str(tmp_path / "folder"), image_size=8, skip_unusable=True)
    for source in ("digits", "black.npy", str(tmp_path / "black.npy"), "folder"):
        assert load_other(source, config, (1, 8, 8), tmp_path).shape == (1, 8, 8)


def test_resuming_with_adamax_is_exact(tmp_path: Path) -> None:
    config, digits = load_config(preset_path("glow-digits")), load("digits", "train")
    batches = digits.images[:640].split(128)
    one, two = (Trainer(config, digits, torch.device("cpu")) for _ in range(2))
    for batch in batches[:3]:
        one.step(batch)
    one.save(tmp_path / "last", {}, for_resuming=True)
    two.restore(tmp_path / "last")
    for batch in batches[3:]:
        assert one.step(batch) == two.step(batch)
    for ours, theirs in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
