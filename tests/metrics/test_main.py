"""python -m glf_fast.metrics: what it prints, and its one-line errors."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import torch

from glf_fast import metrics
from glf_fast.data import load
from glf_fast.errors import UserError
from glf_fast.images import save_png
from glf_fast.metrics import __main__ as command
from glf_fast.metrics.tiny import TINY_WEIGHTS

Make = Callable[..., torch.Tensor]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], private_cache: Path) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["metrics", *map(str, arguments)])
        command.main()
        return capsys.readouterr().out

    return run


def save_npy(path: Path, images: torch.Tensor) -> Path:
    np.save(path, images.numpy())
    return path


def test_calc_on_arrays_folders_and_saved_statistics_agree(run, blobs: Make, tiny, tmp_path: Path) -> None:
    samples, real = blobs(200, 0, level=150), blobs(300, 1)
    a, b = save_npy(tmp_path / "a.npy", samples), save_npy(tmp_path / "b.npy", real)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(samples):
        save_png(tmp_path / "folder" / f"{i}.png", image)
    result = json.loads(run("calc", a, b, "--extractor", "tiny", "--json"))
    expected = metrics.frechet_distance(metrics.collect(samples, tiny), metrics.collect(real, tiny))
    assert result["metric"] == "FD[tiny]" and result["value"] == pytest.approx(expected, rel=1e-9)
    assert result["protocol"]["n"] == 200 and result["protocol"]["reference"]["n"] == 300

    saved = tmp_path / "out" / "b.safetensors"
    assert "300 images, 128 features of tiny" in run("ref", b, "--extractor", "tiny", "--out", saved)
    for source in (a, tmp_path / "folder"):  # the extractor is the saved file's
        again = json.loads(run("calc", source, saved, "--json"))
        assert again["value"] == pytest.approx(expected, rel=1e-9)
    assert run("calc", a, saved).startswith(f"FD[tiny] {expected:.2f} (95 %")
    assert json.loads(run("calc", a, saved, "--n", 50, "--json"))["protocol"]["n"] == 50


def test_a_classifier_beside_the_extractor_has_weights_of_its_own(run, blobs: Make, tmp_path: Path) -> None:
    a, b = save_npy(tmp_path / "a.npy", blobs(60, 0)), save_npy(tmp_path / "b.npy", blobs(60, 1))
    options = ["--extractor", "tiny-mnist", "--classifier", "tiny-cifar10", "--classifier-weights", TINY_WEIGHTS]
    found = json.loads(run("calc", a, b, "--scores", "fd,is", *options, "--json"))["battery"]
    assert [number["name"] for number in found] == ["FD[tiny-mnist]", "IS[tiny-mnist]", "IS[tiny-cifar10]"]
    for scores, message in (("fd", "no other network than the extractor"), ("", "no effect without --scores")):
        with pytest.raises(UserError, match=message):
            run("calc", a, b, "--scores", scores, "--extractor", "tiny", *options[4:])


def test_ref_of_a_data_set_is_cached(
    run, private_cache: Path, fashion_mnist_dir: Path, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        command, "load", lambda name, split, **options: load(name, split, data_dir=fashion_mnist_dir, **options)
    )
    run("ref", "fashion-mnist:test", "--extractor", "tiny", "--n", 500, "--out", tmp_path / "ref.safetensors")
    assert len(list((private_cache / "stats").glob("fashion-mnist-test-500-0-tiny-*.safetensors"))) == 1
    saved = metrics.FeatureStats.load(tmp_path / "ref.safetensors")
    assert saved.n == 500 and saved.source["split"] == "test"


def test_reads_moments_that_others_wrote(run, blobs: Make, tiny, tmp_path: Path) -> None:
    real = metrics.collect(blobs(300, 1), tiny)
    np.savez(tmp_path / "moments.npz", mu=real.mean.numpy(), sigma=real.cov.numpy())
    a = save_npy(tmp_path / "a.npy", blobs(200, 0, level=150))
    result = json.loads(run("calc", a, tmp_path / "moments.npz", "--extractor", "tiny", "--json"))
    expected = metrics.frechet_distance(metrics.collect(blobs(200, 0, level=150), tiny), real)
    assert result["value"] == pytest.approx(expected, rel=1e-6)
    assert (
        result["metric"] == "FD" and result["kid"] is result["precision"] is None
    )  # the extractor of the moments is unknown
    assert result["protocol"]["reference"]["n"] == "unknown"


def test_options_for_folders_leave_arrays_alone(run, blobs: Make, tmp_path: Path) -> None:
    """A folder of pictures of another size, one of them no picture, against an array."""
    a, folder = save_npy(tmp_path / "a.npy", blobs(20, 0)), tmp_path / "folder"
    for i, image in enumerate(blobs(20, 1)):
        save_png(folder / f"{i}.png", image, scale=2)
    (folder / "x.png").write_bytes(b"no picture")
    size = blobs(1, 0).shape[-1]
    options = ("--image-size", size, "--skip-unusable", "--extractor", "tiny", "--json")
    for pair in ((a, folder), (folder, a)):
        protocol = json.loads(run("calc", *pair, *options))["protocol"]
        assert protocol["n"] == 20
        told = protocol["samples" if pair[0] is folder else "reference"]["policies"]
        assert len(told) == 2 and all("1 unusable files left out" in policy for policy in told)
    with pytest.raises(UserError, match=r"a.npy is neither"):
        run("calc", a, a, *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["calc", "nothing", "a.npy", "--extractor", "tiny"],
            "'nothing' is neither a file nor a folder nor a data set",
        ),
        (["calc", "a.npy", "a.npy", "--extractor", "tinny"], "no extractor 'tinny'; did you mean 'tiny'"),
        (
            ["calc", "vgg.safetensors", "vgg.safetensors", "--n", "5"],
            "vgg.safetensors and vgg.safetensors are saved statistics already; leave --n out",
        ),
        (
            ["calc", "vgg.safetensors", "vgg.safetensors", "--extractor", "tiny"],
            "saved statistics already; leave --extractor out",
        ),
        (["calc"], "python -m glf_fast.metrics calc needs A and B; "),
        (["calc", "--wat", "a.npy", "a.npy"], "unknown option --wat"),
        (["calc", "a.npy", "a.npy", "--exractor", "tiny"], "unknown option --exractor; did you mean '--extractor'?"),
        (["calc", "a.npy", "a.npy", "a.npy"], "unexpected argument a.npy"),
        (
            ["calculate", "a.npy", "--n", "5"],
            "there is no command 'calculate'; did you mean 'calc'? the commands are ref, calc",
        ),
        ([], "the commands are ref, calc; "),
        (["calc", "a.npy", "a.npy", "--n", "1"], "--n 1 is too small; a distance needs at least two images"),
        (["calc", "a.npy", "missing.safetensors"], "no statistics at missing.safetensors"),
        (["calc", "a.npy", "vgg.safetensors", "--extractor", "tiny"], "different extractors"),
        (["calc", "a.npy", "broken.npz", "--extractor", "tiny"], "broken.npz"),
        (["calc", "a.npy", "really.npz", "--extractor", "tiny"], "this is a .npy, one array; rename it to really.npy"),
        (
            ["ref", "a.npy", "--out", "b.safetensors", "--json"],
            "unknown option --json; python -m glf_fast.metrics --help",
        ),
        (["calc", "a.npy", "lopsided.npz", "--extractor", "tiny"], "lopsided.npz"),
        (
            ["calc", "a.npy", "nan.npz", "--extractor", "tiny"],
            "nan.npz: the mean or the covariance contains NaN",
        ),
        (["calc", "one.npy", "a.npy", "--extractor", "tiny"], "at least two"),
        (["ref", "a.npy", "--out", "a.npz", "--extractor", "tiny"], "does not end in .safetensors, but statistics"),
        (["calc", "a.npy", "a.npy", "--extractor", "tiny", "--device", "nowhere"], "--device 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(
    run, blobs: Make, tmp_path: Path, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_npy(Path("a.npy"), blobs(50, 0))
    save_npy(Path("one.npy"), blobs(1, 0))
    other = metrics.FeatureStats(
        4, extractor={"name": "vgg16", "weights_sha256": "", "dim": 4, "resize": "", "grey": ""}
    )
    other.update(torch.rand(9, 4))
    other.save("vgg.safetensors")
    Path("broken.npz").write_bytes(b"PK\x03\x04 and then nothing")
    Path("a.npy").with_name("really.npz").write_bytes(Path("a.npy").read_bytes())
    np.savez("nan.npz", mu=np.full(128, np.nan), sigma=np.eye(128))
    np.savez("lopsided.npz", mu=np.zeros(128), sigma=np.zeros((128, 64)))
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        run(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_costs_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics that cannot be written: the system limits files to 50 kB, less than statistics of 128 features."""
    monkeypatch.setenv("GLF_FAST_CACHE", str(tmp_path))
    arguments = ["calc", "digits:test", "digits:train", "--extractor", "tiny"]
    done = forked.ended(forked.command, "metrics.__main__", *arguments, file_size=50_000)
    assert done.returncode == 0 and done.stdout.startswith("FD[tiny]"), done.stderr
    assert "could not be cached" in done.stderr and "File too large" in done.stderr
    assert not list((tmp_path / "stats").iterdir()), "nothing half-written"


def test_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m glf_fast.metrics`: exit code 2, one line on stderr, no traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["metrics", "calc", "nothing", "here"])
    monkeypatch.delitem(sys.modules, "glf_fast.metrics.__main__")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("glf_fast.metrics", run_name="__main__", alter_sys=True)
    errors = capsys.readouterr().err
    assert errors.startswith("error: 'nothing' is neither") and len(errors.splitlines()) == 1
