"""Atomic files, JSON, grids, PNG, one-line errors."""

import json
import os
import re
import resource
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from glf_fast.errors import UserError, did_you_mean
from glf_fast.files import atomic_folder, atomic_write, cache_dir, read_json, save_tensors, sha256, sweep, write_json
from glf_fast.images import grid, save_npy, save_png, to_float, to_uint8
from glf_fast.info import COSTS, info


def test_atomic_write_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(target) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    code = f"""
import resource, signal
from glf_fast.errors import run_command
from glf_fast.files import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def main():
    with atomic_write({str(target)!r}) as temporary:
        temporary.write_bytes(bytes(5000))
run_command(main)
"""
    done = forked.ended(forked.program, code)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000, "the limit was the child's"


def test_tensors_on_a_full_disk_raise_oserror(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(12.0).view(3, 4).T}, {"key": "value"})
    before = (tmp_path / "a.safetensors").read_bytes()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.arange(12.0).view(3, 4).T)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*a\.safetensors"):
            save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("writer", ["save_npy", "save_png"])
def test_images_on_a_full_disk_name_the_file_and_the_reason(writer: str, tmp_path: Path) -> None:
    shape = "300, 1, 32, 32" if writer == "save_npy" else "1, 500, 500"
    program = (
        f"import torch\nfrom glf_fast.images import {writer} as write\nfrom glf_fast.errors import run_command\n"
        f"run_command(lambda: write({str(tmp_path / 'a.out')!r}, torch.randint(256, ({shape}), dtype=torch.uint8)))"
    )
    done = forked.ended(forked.program, program, file_size=50_000)
    assert done.returncode == 2
    assert done.stderr == f"error: [Errno 27] File too large: '{tmp_path / 'a.out'}'\n"
    assert not list(tmp_path.iterdir())


def test_npy_is_numpys(tmp_path: Path) -> None:
    images = torch.randint(256, (3, 1, 4, 5), dtype=torch.uint8)
    for given in (images, images.transpose(0, 3), images[:0]):
        save_npy(tmp_path / "a.npy", given)
        assert np.array_equal(np.load(tmp_path / "a.npy"), given.numpy())


@pytest.mark.parametrize("place", ["new", "empty", "hidden", "link", "working directory"])
def test_atomic_folder_is_all_or_nothing(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    if place != "new":
        (tmp_path / "real" if place == "link" else path).mkdir()
    if place == "link":
        path.symlink_to("real")
    if place == "hidden":
        (path / ".DS_Store").write_text("x")
    if place == "working directory":
        monkeypatch.chdir(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="full"), atomic_folder(path) as temporary:
        (temporary / "0.png").write_text("0")
        raise OSError("full")
    assert sorted(tmp_path.rglob("*")) == before
    with atomic_folder(path) as temporary:
        for name in ("0.png", "1.png"):
            (temporary / name).write_text(name)
        assert not path.exists() or all(file.name.startswith(".") for file in path.iterdir())
        assert re.fullmatch(r"\..+-[a-z0-9_]{8}\.partial", temporary.name)
    assert {file.name for file in path.iterdir()} == {"0.png", "1.png"} | (
        {".DS_Store"} if place == "hidden" else set()
    )
    assert path.is_symlink() == (place == "link")
    plain = tmp_path / "plain"
    plain.mkdir()
    assert path.stat().st_mode == plain.stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2 + (place == "link"), "nothing beside it"


def test_json_round_trip_and_damage(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert read_json(tmp_path / "a.json") == {"ä": [1, 2.5, None]}
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"a.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_leftovers_of_killed_writers_are_swept(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"x")
        name = temporary.name
    left, foreign = [name, name.removesuffix(".png")], [".hidden", ".lock", "b.png", ".my-settings", ".a-abcd1234.png"]
    young = ".young-abcd1234.partial.png"
    for path in [*left, *foreign, young]:
        (tmp_path / path).write_bytes(b"x")
    (tmp_path / ".images-abcd1234.partial").mkdir()
    (tmp_path / ".images-abcd1234.partial" / "0.png").write_bytes(b"x")
    for path in [*left, *foreign, ".images-abcd1234.partial"]:
        os.utime(tmp_path / path, (0, 0))
    shutil.copytree(tmp_path, tmp_path / "another")
    sweep(tmp_path)
    sweep(tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", *foreign, young, "another"}
    with atomic_write(tmp_path / "another" / "c.png"):  # the first write of this process into this folder
        pass
    assert {path.name for path in (tmp_path / "another").iterdir()} == {"a.png", "c.png", *foreign, young}


def test_json_with_a_mark_and_json_without_end(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "a.json") == {}
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep.json is not valid JSON"):
        read_json(tmp_path / "deep.json")


def test_sha256_and_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.delenv("GLF_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "glf_fast"
    monkeypatch.setenv("GLF_FAST_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


def test_pixels_round_and_come_back() -> None:
    assert to_uint8(torch.tensor([-0.1, 0.0, 0.999, 1.0, 1.2])).tolist() == [0, 0, 255, 255, 255]
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(pixels)), pixels)


def test_grid_and_png(tmp_path: Path) -> None:
    images = torch.zeros(5, 3, 4, 6, dtype=torch.uint8)
    images[1] = 7
    picture = grid(images, columns=3, padding=1)
    assert picture.shape == (3, 2 * 5 + 1, 3 * 7 + 1)
    assert (picture[:, 1:5, 8:14] == 7).all()
    assert (picture[:, 6:, 15:] == 255).all(), "the empty place is ground"
    save_png(tmp_path / "a.png", picture, scale=2)
    with Image.open(tmp_path / "a.png") as png:
        assert np.array_equal(np.asarray(png)[::2, ::2].transpose(2, 0, 1), picture.numpy())
    save_png(tmp_path / "grey.png", images[0, :1])
    with Image.open(tmp_path / "grey.png") as png:
        assert png.mode == "L"
    with pytest.raises(ValueError, match="grid needs non-empty uint8"):
        grid(images.float())
    with pytest.raises(ValueError, match="save_png needs a uint8"):
        save_png(tmp_path / "a.png", images)


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        ("UserError('no such thing')", 2, "error: no such thing\n"),
        ("OSError(28, 'No space left on device')", 2, "error: [Errno 28] No space left on device\n"),
        ("KeyboardInterrupt()", 130, "interrupted\n"),
        ("ZeroDivisionError()", 1, "Traceback"),
    ],
)
def test_commands_turn_mistakes_into_one_line(raised: str, code: int, text: str) -> None:
    program = f"from glf_fast.errors import *\ndef main(): raise {raised}\nrun_command(main)"
    done = forked.ended(forked.program, program)
    assert done.returncode == code
    assert done.stderr.startswith(text)


def test_the_nearest_known_word() -> None:
    assert did_you_mean("minst", ("mnist", "digits")) == "did you mean 'mnist'? "
    assert did_you_mean("celeba", ("mnist", "digits")) == ""
    assert did_you_mean("--json", ("--n", "--out")) == ""  # their hyphens are alike, and nothing else
    assert did_you_mean("--nn", ("--n", "--out")) == "did you mean '--n'? "


def test_info_says_what_is_measured() -> None:
    """The costs that `info` states are those of the committed results, as they are or were within 15 %."""
    path = Path(__file__).parents[1] / "bench" / "results" / "epyc-zen5-2-cores" / "times.json"
    assert path.name in COSTS["cpp"]
    rows = json.loads(path.read_text())["results"]
    times = {(r["case"], r["mode"], r["provider"]): r["stats"]["median"] for r in rows}
    stated = [float(number) for number in re.findall(r"([\d.]+) \(D", COSTS["cpp"])]
    for case, ratio in zip(("glf-cifar", "glf-mnist"), stated, strict=True):
        measured = times[case, "train", "eager"] / times[case, "train", "glf_fast"]
        assert ratio == pytest.approx(measured, rel=0.15)


def test_info_tells_what_runs() -> None:
    known = info()
    assert known["torch"] == torch.__version__
    assert known["backend reference"].startswith("ready")
