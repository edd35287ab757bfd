"""Comparisons of models: rows, runs that are killed or fail, tables that grow, and the files with the results."""

import dataclasses
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import forked
import pytest
import several_processes
import torch
from safetensors.torch import load_file

from glf_fast import compare, train
from glf_fast.errors import UserError
from glf_fast.models.vae import VAE
from glf_fast.training import comparison, comparison_page, comparison_plan, runs
from glf_fast.training.comparison_plan import Plan, rows, sizes
from glf_fast.training.config_files import load, preset_path, presets, to_toml

Call = Callable[..., None]
SMOKE = ["--data", "digits", "--size", "smoke", "--epochs", "1"]


@pytest.fixture(scope="session")
def finished(once: Callable[[str, Callable[[Path], object]], Path], cache: Path) -> Path:
    """A finished comparison of two rows; not to be changed."""

    def made(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GLF_FAST_CACHE", str(cache))
            patch.setattr("sys.argv", ["compare", *SMOKE, "--models", "glf,vae", "--out", str(folder)])
            compare.main()

    return once("comparison", made)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "comparison"))


def results(folder: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads((folder / "comparison.json").read_text())["rows"]}


def states(folder: Path) -> dict[str, list[str]]:
    return {name: [run["state"] for run in row["runs"]] for name, row in results(folder).items()}


# -- rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["digits", "fashion-mnist", "cifar10", "celeba"])
@pytest.mark.parametrize("size", sizes())
def test_all_rows_share_their_settings(size: str, data: str) -> None:
    plan = Plan(rows(), data, size)
    shared = plan.shared
    assert shared.data.source == data and (shared.data.image_size == 64) == (data == "celeba" and size != "smoke")
    for row in rows():
        config = plan.config(row, seed=3)
        assert config.seed == 3
        assert config.data == shared.data and config.score == shared.score
        assert (config.epochs, config.batch_size, config.ema) == (shared.epochs, shared.batch_size, shared.ema)
        own = comparison_page.tomllib.loads(comparison_plan.row_file(row).read_text())["model"]
        for name in {"latent_dim", "width", "hidden"} - own.keys():  # a row may be about one of them
            assert getattr(config.model, name) == getattr(shared.model, name), (row, name)
        assert own["name"] == config.model.name


def test_sizes_are_those_of_the_presets() -> None:
    """A preset is a row by itself: quick with its loss, but networks of half the width; the paper's with theirs, but no
    scores during training, so that no row can choose among checkpoints."""
    quick = load(preset_path("quick"))
    halved = dataclasses.replace(quick.model, width=16, hidden=256)
    row = Plan(("glf-l1",), "fashion-mnist", "quick").config("glf-l1")
    assert to_toml(row) == to_toml(dataclasses.replace(quick, model=halved))
    for data in ("mnist", "fashion-mnist", "cifar10", "celeba"):
        for row, preset in (("glf", data), ("glf-perceptual", f"{data}-perceptual")):
            paper = load(preset_path(preset))
            paper = dataclasses.replace(paper, score=dataclasses.replace(paper.score, every=0))
            assert to_toml(Plan((row,), data, "paper").config(row)) == to_toml(paper), preset


def test_rows_and_sizes_are_no_presets() -> None:
    assert not {"vae", "paper", "fid"} & set(presets())
    order = [row for row in (comparison_plan._FOLDER / "order.txt").read_text().split() if row in rows()]
    assert list(rows()) == order + sorted(set(rows()) - set(order)) and rows()[:3] == (
        "glf",
        "glf-l1",
        "glf-perceptual",
    )
    assert set(sizes()) == {"smoke", "quick", "paper"}


def test_a_shared_table_is_for_the_models_that_have_it(tmp_path: Path) -> None:
    shared = tmp_path / "shared.toml"
    shared.write_text("[flow]\nsteps = 3\n[flow_optimizer]\nlr = 0.5\n")
    assert load(model="vae", shared=[shared]) == load(model="vae")
    assert load(model="glf", shared=[shared]).optimizers["flow"].lr == 0.5
    shared.write_text("[folw]\nsteps = 3\n")
    with pytest.raises(UserError, match="unknown key 'folw'; did you mean 'flow'"):
        load(model="glf", shared=[shared])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "glf,vea"], "no row 'vea' to compare; did you mean 'vae'? the rows are glf, "),
        (["--size", "qick"], "no size 'qick'; did you mean 'quick'? the sizes are paper, quick, smoke"),
        (["--seeds", "0"], "--seeds 0 must be 1 or more"),
        (["--epochs", "0"], "epochs = 0 must be positive"),
        (["--data", "fashoin-mnist"], "fashion-mnist"),
        (["--modles", "glf"], "unknown option --modles; did you mean '--models'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, call: Call
) -> None:
    with pytest.raises(UserError) as error:
        call(compare, *SMOKE, "--out", tmp_path / "c", *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()


def test_other_folders_are_left_alone(tmp_path: Path, call: Call) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match="choose another --out"):
            call(compare, *SMOKE, "--models", "vae", "--out", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_dry_run_takes_steps_and_writes_nothing(
    tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    call(compare, *SMOKE, "--models", "vae,glf", "--seeds", "2", "--out", tmp_path / "c", "--dry-run")
    vae, glf, total = capsys.readouterr().out.splitlines()
    assert re.match(r"vae +14,753 parameters +\S+ s a step, about \S+ minutes +.*/runs/vae-seed-0 \(new\)", vae)
    assert glf.startswith("glf ") and "for 4 runs" in total
    assert not (tmp_path / "c").exists()


def test_the_folder_is_named_by_data_size_and_epochs() -> None:
    assert Plan(("vae",), "digits", "smoke").folder == Path("comparisons/digits-smoke-4-epochs")
    assert Plan(("vae",), "/some where/x.npz", "quick", 3).folder == Path("comparisons/x.npz-quick-3-epochs")


# -- scores ---------------------------------------------------------------------------------------------------------------


def test_further_scores_are_given_to_finished_runs_without_training(folder: Path, call: Call) -> None:
    logs = {row: (folder / "runs" / f"{row}-seed-0" / "metrics.jsonl") for row in ("glf", "vae")}
    steps = {row: log.read_text().count("images_per_second") for row, log in logs.items()}
    call(compare, *SMOKE, "--models", "glf,vae", "--out", folder, "--scores", "fd,is,dc,modes")
    head, _, *lines = [line for line in (folder / "comparison.md").read_text().splitlines() if line.startswith("|")]
    titles = [title.strip() for title in head.strip("|").split("|")]
    asked = [f"{name}[tiny]" for name in ("IS", "density", "coverage", "modes hit", "KL to uniform", "KL to real")]
    assert [title for title in titles if title in asked] == asked and not {"KID", "precision", "recall"} & set(titles)
    for line in lines[:3]:  # two rows, and real training images
        cells = dict(zip(titles, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        assert 1 <= float(cells["IS[tiny]"]) <= 10 and 0 <= float(cells["coverage[tiny]"]) <= 1
    assert steps == {row: log.read_text().count("images_per_second") for row, log in logs.items()}
    call(compare, *SMOKE, "--models", "vae", "--out", folder)  # and left out again
    left = (folder / "comparison.md").read_text()
    assert "IS[tiny]" not in left and "KID" in left
    with pytest.raises(UserError, match=r"score.scores: there is no score 'critc'; did you mean 'critic'"):
        call(compare, *SMOKE, "--models", "vae", "--out", folder, "--scores", "fd,critc")


# -- results --------------------------------------------------------------------------------------------------------------


def test_each_run_is_an_ordinary_run(finished: Path, tmp_path: Path, call: Call) -> None:
    ours = finished / "runs" / "vae-seed-0"
    call(train, "--config", ours / "config.toml", "--out", tmp_path / "alone")
    for part in ("best", "last"):
        weights = [load_file(run / "checkpoints" / part / "model.safetensors") for run in (ours, tmp_path / "alone")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1]), part
    assert runs.read_scores(ours) == runs.read_scores(tmp_path / "alone")


def test_the_json_has_everything(finished: Path) -> None:
    record = json.loads((finished / "comparison.json").read_text())
    assert record["format"] == comparison_page.FORMAT
    assert record["data"]["name"] == record["data"]["source"] == "digits" and record["epochs"] == 1
    assert record["versions"].keys() == {"glf_fast", "torch", "python"} and "thread" in record["machine"]
    assert record["settings"].keys() == {"smoke.toml"} and record["floors"]["FD[tiny]"].keys() >= {"train/test"}
    assert [row["name"] for row in record["rows"]] == ["glf", "vae"]
    for row in record["rows"]:
        assert row["title"] and row["what"] and row["parameters"] > 10_000 and "name = " in row["settings"]
        [run] = row["runs"]
        assert (finished / run["folder"] / "config.toml").is_file()
        assert (run["seed"], run["state"], run["reason"], run["epoch"]) == (0, "finished", "", 1.0)
        assert run["minutes"] > 0 and run["prior_scores"] == []
        assert run["scores"] == runs.read_scores(finished / run["folder"])
        [score] = run["scores"]
        assert score["samples"]["protocol"]["n"] == 180 and score["samples"]["kid"] and score["reconstructions"]
        assert 0 <= score["samples"]["precision"] <= 1 and 0 <= score["samples"]["recall"] <= 1


class Page(HTMLParser):
    """Text and tags of a page whose elements are all closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_shows_everything(finished: Path) -> None:
    text = (finished / "comparison.html").read_text()
    page = Page(text)
    assert "$" not in re.sub(r"base64,[^\"]*", "", text) and "prefers-color-scheme: dark" in text
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.seen}
    pictures = [attributes["src"] for tag, attributes in page.seen if tag == "img"]
    assert len(pictures) == 2 + 3, "samples of two rows; test images, and two rows of reconstructions"
    assert all(source and source.startswith("data:image/png;base64,") for source in pictures)
    for row in results(finished).values():
        value = row["runs"][0]["scores"][0]["samples"]["value"]
        assert page.text.count(f"{value:.2f}") >= 3, "a bar, the table and the caption"
        assert f"{row['parameters']:,}" in page.text and row["what"] in page.text


def test_the_table_is_markdown(finished: Path) -> None:
    lines = [line for line in (finished / "comparison.md").read_text().splitlines() if line.startswith("|")]
    head, rule, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert head[:3] == ["", "FD[tiny] (95 %)", "reconstructions"] and head[-2:] == ["minutes", "parameters"]
    assert {"KID", "precision", "recall", "bits per dimension"} <= set(head)
    assert all(set(cell) == {"-"} for cell in rule)
    assert [line[0] for line in body] == ["glf", "vae", "real training images"]
    assert all(len(line) == len(head) for line in body)


def test_only_numbers_that_were_read_in_a_source_are_published(finished: Path) -> None:
    record = json.loads((finished / "comparison.json").read_text())
    assert record["published"] == [] and "Published" not in (finished / "comparison.html").read_text()
    every = comparison_page.tomllib.loads(comparison_page._PUBLISHED.read_text())["fid"]
    assert all({"row", "data", "value", "source", "status"} <= set(entry) for entry in every)
    assert {entry["status"] for entry in every} == {"verified", "from memory, unconfirmed"}
    record["data"]["source"] = "mnist"
    record["rows"][0]["name"] = "glf-perceptual"
    record |= {"published": comparison_page.published(record)}
    shown = [(entry["row"], entry["value"]) for entry in record["published"]]
    assert shown == [("glf-perceptual", 5.8), ("vae", 19.21)], "28.2 is from memory"
    text = comparison_page.markdown(record)
    apart = text.index("Published, FID, other protocol")
    assert "5.8" in text[apart:] and "1905.10485" in text[apart:] and "28.2" not in text


# -- tables that grow -----------------------------------------------------------------------------------------------------


def test_more_seeds_extend_the_table(folder: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/checkpoints/best/*")}
    call(compare, *SMOKE, "--models", "vae", "--seeds", "2", "--out", folder)
    text = capsys.readouterr()
    assert "row 2 of 2: vae, seed 1" in text.err
    assert states(folder) == {"glf": ["finished"], "vae": ["finished"] * 2}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "nothing is trained twice"
    values = [run["scores"][0]["samples"]["value"] for run in results(folder)["vae"]["runs"]]
    mean, half = sum(values) / 2, abs(values[0] - values[1]) / 2
    assert f"{mean:.2f} ± {half * 2**0.5:.2f} (2)" in text.out and half > 0
    table = [line.split("|")[1].strip() for line in text.out.splitlines() if line.startswith("|")]
    assert table[2:] == ["glf", "vae", "real training images"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [(["--epochs", "2"], "epochs = 1, now 2"), (["--size", "quick"], "latent_dim = 8, now 32")],
)
def test_other_shared_settings_are_refused(change: list[str], difference: str, folder: Path, call: Call) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match=r"was trained with other settings.*choose another --out") as error:
        call(compare, *SMOKE, "--models", "glf-l1", "--out", folder, *change)
    assert difference in str(error.value)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_prior_is_scored_beside_the_fitted_density(
    folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In three steps: the model draws from N(0, I) anyway; it has a density; it has a score by that already."""
    [ours] = runs.read_scores(folder / "runs/vae-seed-0")
    monkeypatch.setattr(VAE, "sampling_modes", {"prior": "z ~ N(0, I)"})
    call(compare, *SMOKE, "--models", "vae", "--out", folder)
    assert "| from N(0, I)" not in capsys.readouterr().out and runs.read_scores(folder / "runs/vae-seed-0") == [ours]

    sample = VAE.sample
    monkeypatch.setattr(VAE, "sample", lambda model, n, *, mode, generator, **_: (
        sample(model, n, generator=generator) if mode != "prior" else torch.rand(n, *model.shape, generator=generator)
    ))  # fmt: skip
    for _ in range(2):
        call(compare, *SMOKE, "--models", "vae", "--out", folder)
        [usual], [prior] = (results(folder)["vae"]["runs"][0][key] for key in ("scores", "prior_scores"))
        assert usual == ours and prior["settings"] == usual["settings"] | {"mode": "prior"}
        assert prior["samples"]["value"] != usual["samples"]["value"]
        assert prior["reconstructions"] == usual["reconstructions"]
        assert results(folder)["glf"]["runs"][0]["prior_scores"] == []
        text = capsys.readouterr().out
        assert "| from N(0, I)" in text and f"| {prior['samples']['value']:.2f} " in text
        monkeypatch.setattr(comparison, "evaluate_mode", None)


# -- when things go wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder of rows, to be changed."""
    copy = Path(shutil.copytree(comparison_plan._FOLDER, tmp_path / "rows"))
    monkeypatch.setattr(comparison_plan, "_FOLDER", copy)
    return copy


def test_a_row_that_fails_is_a_line_with_its_reason(
    own_rows: Path, folder: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_rows / "diverges.toml").write_text('[model]\nname = "vae"\n[optimizer]\nlr = 1e30\n')
    with pytest.raises(UserError, match=r"1 of 2 runs failed \(diverges\); the table has the reasons"):
        call(compare, *SMOKE, "--models", "diverges,glf-l1", "--out", folder)
    assert "diverges failed: " in capsys.readouterr().err
    wanted = {"glf": ["finished"], "glf-l1": ["finished"], "vae": ["finished"], "diverges": ["failed"]}
    assert states(folder) == wanted
    reason = results(folder)["diverges"]["runs"][0]["reason"]
    assert "not finite" in reason and "\n" not in reason
    for name in ("comparison.md", "comparison.html"):
        assert "not finite" in (folder / name).read_text()
    Page((folder / "comparison.html").read_text())
    call(compare, *SMOKE, "--models", "vae", "--out", folder)  # does not fail: that row is not asked for
    assert states(folder) == wanted and results(folder)["diverges"]["runs"][0]["reason"] == reason


def test_runs_that_do_not_belong_are_named(folder: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs/glf-seed-0").rename(folder / "runs/gone-seed-0")
    shutil.copytree(folder / "runs/vae-seed-0", folder / "runs/vae-seed-01")
    call(compare, *SMOKE, "--models", "vae", "--out", folder)
    errors = capsys.readouterr().err
    for name in ("gone-seed-0", "vae-seed-01"):
        assert f"runs/{name} is not a run of a known row; it is left out" in errors
    assert states(folder) == {"vae": ["finished"]}


def test_a_run_with_other_scores_is_no_row(folder: Path, call: Call) -> None:
    [score] = runs.read_scores(folder / "runs/glf-seed-0")
    (folder / "runs/glf-seed-0/scores.json").unlink()
    runs.write_scores(folder / "runs/glf-seed-0", [score | {"settings": score["settings"] | {"n": 5}}])
    call(compare, *SMOKE, "--models", "vae", "--out", folder)
    assert states(folder) == {"glf": ["failed"], "vae": ["finished"]}
    assert "run python -m glf_fast.evaluate" in (folder / "comparison.md").read_text()


def test_processes_need_not_see_what_the_first_has_written(folder: Path, tmp_path: Path) -> None:
    [(printed, _), nothing] = several_processes.finished(
        2, several_processes.resulting, str(folder), str(tmp_path / "no")
    )
    assert nothing == ("", "") and printed == "{'glf': ['finished'], 'vae': ['finished']}\n"


def test_a_table_of_failures_alone(own_rows: Path, tmp_path: Path, call: Call) -> None:
    (own_rows / "diverges.toml").write_text('[model]\nname = "vae"\n[optimizer]\nlr = 1e30\n')
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        call(compare, *SMOKE, "--models", "diverges", "--out", tmp_path / "c")
    text = (tmp_path / "c" / "comparison.md").read_text()
    assert "| state " in text and "| failed |" in text and "not finite" in text
    Page((tmp_path / "c" / "comparison.html").read_text())


def wait_for(path: Path, process: forked.Child) -> None:
    deadline = time.monotonic() + 120  # a busy machine starts processes slowly
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_a_killed_comparison_goes_on(
    tmp_path: Path, finished: Path, command: Callable[..., forked.Child], call: Call
) -> None:
    arguments = [*SMOKE, "--models", "glf,vae", "--out", tmp_path / "c"]
    process = command("compare", *arguments)
    wait_for(tmp_path / "c" / "runs" / "vae-seed-0" / "config.toml", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert states(tmp_path / "c") == {"glf": ["finished"]}
    before = (tmp_path / "c/runs/glf-seed-0/metrics.jsonl").read_bytes()
    call(compare, *arguments)
    assert (tmp_path / "c/runs/glf-seed-0/metrics.jsonl").read_bytes() == before
    ours, theirs = (
        {name: row["runs"][0]["scores"] for name, row in results(folder).items()}
        for folder in (tmp_path / "c", finished)
    )
    assert ours == theirs


def test_a_signal_stops_with_a_checkpoint_and_one_works_at_a_time(
    tmp_path: Path, command: Callable[..., forked.Child], call: Call
) -> None:
    arguments = [*SMOKE[:4], "--epochs", "100000", "--models", "vae,glf", "--out", tmp_path / "c"]
    process = command("compare", *arguments)
    wait_for(tmp_path / "c" / "runs" / "vae-seed-0" / "metrics.jsonl", process)
    with pytest.raises(UserError, match=f"another process is training in {tmp_path / 'c'}"):
        call(compare, *arguments)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "run the same command again to resume" in errors and "Traceback" not in errors
    assert (tmp_path / "c/runs/vae-seed-0/checkpoints/last/checkpoint.json").is_file()
    assert not (tmp_path / "c/runs/glf-seed-0").exists()
