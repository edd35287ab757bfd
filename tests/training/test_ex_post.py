"""Whole runs of a model with an ex-post density: every kind trains, resumes bit for bit after a kill anywhere, and samples."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glf_fast import evaluate, sample, train
from glf_fast.models import RAE, density
from glf_fast.training import checkpoint, runs
from glf_fast.training.run import Run
from glf_fast.training.trainer import Trainer

Call = Callable[..., None]
SMALL = ["--model.latent-dim", "4", "--model.width", "4", "--model.hidden", "16"]
KINDS = {
    "none": [],
    "gaussian": [],
    "mixture": ["--density.components", "3"],
    "flow": ["--density.steps", "2", "--density.hidden", "8", "--density.epochs", "2"],
}


def arguments(kind: str, folder: Path, *more: str) -> list[str]:
    settings = [
        "--model.name",
        "rae",
        "--data.source",
        "digits",
        "--epochs",
        "1",
        "--batch-size",
        "128",
        "--ema",
        "0.9",
    ]
    scores = ["--score.extractors", "tiny", "--score.samples", "60", "--score.every", "1", "--pictures-every", "100"]
    own = [*SMALL, "--density.kind", kind, *KINDS[kind], *more]
    folder.with_name("empty.toml").write_text("")
    config = ["--config", str(folder.with_name("empty.toml"))]
    return [*config, *settings, *scores, *own, "--out", str(folder), "--checkpoint-minutes", "0"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    parts = ("last/model", "last/training", "best/model")
    files = {part: load_file(folder / "checkpoints" / f"{part}.safetensors") for part in parts}
    return {f"{part}.{name}": value for part, found in files.items() for name, value in found.items()}


def stopped(
    command: list[str], call: Call, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, when: str
) -> None:
    """The run, as it is left by a crash before or after this function of `owner` was called in the second stage."""
    function = getattr(owner, name)

    def crash(*args: object, **options: object) -> None:
        if when == "after":
            function(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, crash)
        call(train, *command)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_resumes_bit_for_bit_and_samples(
    kind: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    call(train, *arguments(kind, whole))
    command, step = arguments(kind, broken), Trainer.step

    def crash(self: Trainer, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.images >= 5 * 128:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", crash)
        call(train, *command)
    fits = {"flow": (density, "fit"), "none": ()}.get(kind, (density, "fit_mixture"))
    if fits:
        stopped(command, call, monkeypatch, Trainer, "advance", "before")
        stopped(command, call, monkeypatch, *fits, "after")  # the flow has changed, the density has not
        stopped(command, call, monkeypatch, Trainer, "advance", "after")
    stopped(command, call, monkeypatch, Run, "finish", "before")
    call(train, *command)
    first, second = tensors(whole), tensors(broken)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert any(".density." in name for name in first) == (kind != "none")
    scores = [[record["score"] for record in runs.read_metrics(run) if "score" in record] for run in (whole, broken)]
    assert len(scores[0]) == 1 and scores[0] == scores[1]

    capsys.readouterr()
    model, _ = checkpoint.load_model(whole / "checkpoints" / "best", torch.device("cpu"))
    assert isinstance(model, RAE)
    codes = [model.sample_codes(5, generator=torch.Generator().manual_seed(0), mode=mode) for mode in ("", "prior")]
    assert torch.equal(*codes) == (kind == "none")
    for mode in ([], ["--mode", "prior"]):
        call(sample, whole, "--n", "4", "--out", tmp_path / "samples.png", *mode)
        assert (tmp_path / "samples.png").is_file()
    call(evaluate, whole, "--mode", "prior")
    assert "FD[tiny]" in capsys.readouterr().out
    page = (whole / "report.html").read_text()
    assert "RAE" in page and "Reconstructions" in page


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "flow"])
def test_collapsed_codes_do_not_end_a_run(kind: str, tmp_path: Path, call: Call) -> None:
    """A weight on the codes' norm that leaves no information in them."""
    call(train, *arguments(kind, tmp_path / "r", "--model.beta", "1e6", "--ema", "0"))
    weights = load_file(tmp_path / "r" / "checkpoints" / "best" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())
    [score] = [record["score"] for record in runs.read_metrics(tmp_path / "r") if "score" in record]
    assert score["value"] > 0


@pytest.mark.usefixtures("curves")
def test_ctrl_c_while_a_flow_is_fitted_ends_the_run_and_the_fit_is_done_again(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    call(train, *arguments("flow", whole))
    fit = density.fit

    def interrupted(*args: object, **options: object) -> object:
        result = fit(*args, **{**options, "epochs": 1})
        result.stopped = "interrupted"
        return result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(density, "fit", interrupted)
        call(train, *arguments("flow", broken))
    call(train, *arguments("flow", broken))
    first, second = tensors(whole), tensors(broken)
    assert all(torch.equal(first[name], second[name]) for name in first)
