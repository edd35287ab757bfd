"""Whole runs and comparisons of models of sequences: trained, resumed bit for bit, sampled, scored, shown."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from glf_fast import compare, evaluate, sample, train
from glf_fast.data import expressions
from glf_fast.errors import UserError
from glf_fast.grammar import EXPRESSIONS, Parser
from glf_fast.metrics import search
from glf_fast.metrics.objectives import Objective
from glf_fast.training import runs, sequence_scoring
from glf_fast.training.trainer import Trainer

Call = Callable[..., None]
SMALL = {
    "model": {"latent-dim": 4, "dense": 16, "units": 8, "layers": 1},
    "score": {"samples": 60, "every": 1},
}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand expressions in place of 100,000, and searches with fewer points."""
    some = tuple(expressions.all_expressions()[::100])
    monkeypatch.setattr(expressions, "all_expressions", lambda: some)
    monkeypatch.setattr(sequence_scoring, "KNOWN", 30)
    monkeypatch.setattr(search, "CANDIDATES", 60)


def arguments(preset: str, folder: Path, *more: str) -> list[str]:
    settings = [f"--{table}.{name}={value}" for table, values in SMALL.items() for name, value in values.items()]
    rest = ["--epochs", "2", "--batch-size", "300", "--checkpoint-minutes", "0", "--score.searches", "0"]
    return ["--preset", f"expressions-{preset}", *settings, *rest, *more, "--out", str(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    parts = ("last/model", "last/training", "best/model")
    files = {part: load_file(folder / "checkpoints" / f"{part}.safetensors") for part in parts}
    return {f"{part}.{name}": value for part, found in files.items() for name, value in found.items()}


@pytest.mark.parametrize(("preset", "more"), [("grammar-rae", "--density.components=3"), ("gvae", ""), ("cvae", "")])
def test_a_run_resumes_bit_for_bit_samples_and_scores(
    preset: str,
    more: str,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = [more] if more else []
    call(train, *arguments(preset, whole, "--score.searches=1", *options))
    assert "searches of 5 × 50 points: valid" in capsys.readouterr().out
    step = Trainer.step

    def crash(self: Trainer, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.images >= 3 * 300:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", crash)
        call(train, *arguments(preset, broken, *options))
    call(train, *arguments(preset, broken, *options))
    first, second = weights(whole), weights(broken)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    capsys.readouterr()
    call(sample, whole, "--n", "7", "--out", tmp_path / "s.txt")
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "s.txt").read_text().splitlines() == printed and len(printed) == 7
    if preset != "cvae":
        assert all(map(Parser.of(EXPRESSIONS).parses, printed))
    call(sample, whole, "--n", "3", "--temperature", "1", "0.5", "--out", tmp_path / "s.npy")
    found = capsys.readouterr().out.splitlines()
    assert np.load(tmp_path / "s.npy").shape[0] == len(found) == 6 and found[:3] == printed[:3]

    [score] = runs.read_scores(whole)
    found = score["sequences"]
    assert found["samples"]["n"] == 60 and 0 <= found["reconstructed"] <= 1 and len(found["interpolations"]) == 3
    assert found["search"]["seeds"] == 1 and found["search"]["known"] == 30
    assert found["samples"]["valid"] == 1 or preset == "cvae"
    call(evaluate, broken, "--n", "30", "--temperature", "0.5")
    assert "30 samples: valid" in capsys.readouterr().out and len(runs.read_scores(broken)) == 2
    page = (whole / "report.html").read_text()
    assert printed[0] in page and "Interpolations" in page and "valid samples" in page
    assert ("found: " in page) == bool(found["search"]["best"])


def test_codes_are_judged_by_what_they_are_decoded_to() -> None:
    class Decodes(torch.nn.Module):
        """Code z decodes to the text of the integer z, code 3 to one without a value."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        evaluating = contextlib.nullcontext
        sample_codes = encode = text = decode = staticmethod(lambda z: z)

    model = Decodes()
    model.text = lambda z: [str(int(value)) for value in z]  # type: ignore[assignment]
    judge = sequence_scoring._Judge(model, Objective("", lambda text: float(text) ** 2), lambda text: text != "3")  # type: ignore[arg-type]
    assert judge(np.array([[3.0]])).tolist() == [0.0]
    assert judge(np.array([[2.0], [3.0], [-5.0]])).tolist() == [4.0, 25.0, 25.0]
    assert judge.seen == [("3", None), ("2", 4.0), ("3", None), ("-5", 25.0)]


def test_options_for_images_are_refused(tmp_path: Path, call: Call) -> None:
    call(train, *arguments("cvae", tmp_path / "r", "--epochs", "1"))
    for command, options, message in (
        (sample, ["--out", "x.png"], "must end in .txt or .npy: this model draws sequences"),
        (sample, ["--towards", "0", "1"], "images are needed"),
        (sample, ["--label", "3"], "--label is for images"),
        (sample, ["--n", str(2**62)], "sequences are more than any memory holds; draw fewer"),
        (evaluate, ["--extractor", "tiny"], "--extractor is for images"),
        (evaluate, ["--other-data", "mnist"], "--other-data is for images"),
    ):
        with pytest.raises(UserError) as error:
            call(command, tmp_path / "r", *options)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_sequences_refuses_images(tmp_path: Path, call: Call) -> None:
    with pytest.raises(UserError, match=r"takes token sequences, but digits holds images"):
        call(train, *arguments("gvae", tmp_path / "r", "--data.source", "digits"))


@pytest.mark.usefixtures("curves")
def test_own_sentences_without_an_objective(tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.grammar").write_text("S -> 'a' S | 'b' S | 'c'\n")
    (tmp_path / "s.txt").write_text("".join(f"{n:05b}c\n".replace("0", "a").replace("1", "b") for n in range(32)))
    source = ["--data.source", str(tmp_path / "s.txt"), "--batch-size", "10", "--model.kernels", "2", "2", "2"]
    call(train, *arguments("grammar-rae", tmp_path / "r", *source, "--density.components", "2"))
    assert "objective" not in capsys.readouterr().out
    (tmp_path / "s.grammar").write_text("S -> 'a' S | 'b' S | 'c' | 'd'\n")
    with pytest.raises(UserError, match="holds other data than"):
        call(evaluate, tmp_path / "r")


def test_a_comparison_of_sequences(tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    smoke = ["--data", "expressions", "--size", "smoke", "--out", tmp_path / "c"]
    call(compare, *smoke, "--models", "character-vae", "--dry-run")
    assert "character-vae" in capsys.readouterr().out and not (tmp_path / "c").exists()
    call(compare, *smoke)
    text = (tmp_path / "c" / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    record = json.loads((tmp_path / "c" / "comparison.json").read_text())
    names = [row["name"] for row in record["rows"]]
    assert names == ["grammar-rae", "grammar-vae", "character-vae"] and record["kind"] == "tokens"
    assert all(run["state"] == "finished" for row in record["rows"] for run in row["runs"])
    page = (tmp_path / "c" / "comparison.html").read_text()
    for shown in (*names, "3.22 ± 0.03", "from memory, unconfirmed", "Best sequences"):
        assert shown in text and shown in page
    with pytest.raises(
        UserError, match="no row 'glf' to compare; the rows are grammar-rae, grammar-vae, character-vae"
    ):
        call(compare, *smoke, "--models", "glf")
