"""Checkpoints: whole or not there, checked when read, never code."""

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import threading
from pathlib import Path

import forked
import pytest
import torch
from torch import nn

from glf_fast.errors import UserError
from glf_fast.files import sha256
from glf_fast.training import checkpoint
from glf_fast.training.checkpoint import Checkpoint


def content(value: float, size: int = 10) -> Checkpoint:
    weights = {"a.weight": torch.full((size,), value), "b": torch.tensor(3)}
    return Checkpoint(
        "glf", {"latent_dim": 2}, weights, {"optimizer.a.weight.step": torch.tensor(value)}, {"images": 5}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "last"
    checkpoint.write(folder, content(1.0))
    return folder


def assert_holds(folder: Path, value: float) -> None:
    read, wanted = checkpoint.read(folder, training=True), content(value)
    assert (read.model, read.config, read.state) == (wanted.model, wanted.config, wanted.state)
    for ours, theirs in ((read.weights, wanted.weights), (read.training, wanted.training)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_reads_what_was_written_and_replaces_it(folder: Path) -> None:
    assert_holds(folder, 1.0)
    checkpoint.write(folder, content(2.0))
    assert_holds(folder, 2.0)
    assert [path.name for path in folder.parent.iterdir()] == ["last"]
    assert checkpoint.read(folder).training == {}


def test_a_crash_between_the_two_renames_loses_nothing(folder: Path) -> None:
    os.rename(folder, folder.with_name(".last-previous"))
    assert checkpoint.exists(folder)
    assert_holds(folder, 1.0)
    checkpoint.write(folder, content(2.0))
    assert_holds(folder, 2.0)
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


def test_leftovers_of_a_killed_writer_do_no_harm(folder: Path) -> None:
    leftover = folder.with_name(".last-new")
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert_holds(folder, 1.0)
    checkpoint.write(folder, content(2.0))
    assert_holds(folder, 2.0)
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "config.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty"])
def test_damage_is_named_with_the_file(folder: Path, name: str, damage: str) -> None:
    file = folder / name
    data = bytearray(file.read_bytes())
    data[0 if name == "checkpoint.json" else -2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    with pytest.raises(UserError) as error:
        checkpoint.read(folder, training=True)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert "restore it from a copy" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not the index of a checkpoint"),
        ("{}", "is not the index of a checkpoint"),
        ('{"format": 1}', "is not the index of a checkpoint"),
        (
            '{"format": 99, "version": "7.1", "model": "glf"}',
            r"written by glf_fast 7\.1 in format 99; .* use the version that",
        ),
    ],
)
def test_an_index_of_another_kind_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "checkpoint.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.read(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"images": 1}, {"epoch": 7.5}, {"data": "other"}])
def test_a_changed_state_is_noticed(folder: Path, changes: dict[str, object]) -> None:
    index = json.loads((folder / "checkpoint.json").read_text())
    index["state"] |= changes
    (folder / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"checkpoint.json is damaged: its checksum differs; restore it from a copy"):
        checkpoint.read_state(folder)


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    assert not checkpoint.exists(tmp_path / "last")
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.read(tmp_path / "last")


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_run_even_with_a_matching_checksum(folder: Path, tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    contents = {"model.safetensors": trap, "training.safetensors": trap}
    contents["config.json"] = json.dumps({"weights_sha256": hashlib.sha256(trap).hexdigest()}).encode()
    for name, damaged in contents.items():
        (folder / name).write_bytes(damaged)
        index = json.loads((folder / "checkpoint.json").read_text())
        index.pop("sha256", None)  # version 0.1.0 wrote none
        index["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        (folder / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not hold readable safetensors"):
        checkpoint.read(folder, training=True)
    assert not (tmp_path / "sprung").exists()


def test_when_the_disk_is_full_the_old_one_stays(folder: Path) -> None:
    """A real failure: the system refuses to let any file of this process grow beyond 100 kB."""
    code = f"""
import resource
from pathlib import Path
import torch
from glf_fast.errors import run_command
from glf_fast.training import checkpoint
from glf_fast.training.checkpoint import Checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = Checkpoint("glf", {{}}, {{"a": torch.zeros(100_000)}}, {{}}, {{}})
run_command(lambda: checkpoint.write(Path({str(folder)!r}), big))
"""
    result = forked.ended(forked.program, code)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {folder} could not be written") and "File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert_holds(folder, 1.0)
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


def test_an_optimizer_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3)

    def setup() -> tuple[nn.Module, torch.optim.Adam, dict[torch.Tensor, str]]:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.Adam([{"params": [model.bias]}, {"params": [model.weight], "lr": 0.1}], fused=True)
        return model, optimizer, {parameter: name for name, parameter in model.named_parameters()}

    def step(model: nn.Module, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    model, optimizer, names = setup()
    step(model, optimizer)
    tensors = checkpoint.optimizer_tensors(optimizer, names)
    assert {name.split(".")[1] for name in tensors} == {"weight", "bias"}
    checkpoint.write(tmp_path / "c", Checkpoint("", {}, model.state_dict(), tensors, {"images": 5}))
    saved = checkpoint.read(tmp_path / "c", training=True)
    other, other_optimizer, other_names = setup()
    other.load_state_dict(saved.weights)
    checkpoint.restore_optimizer(other_optimizer, other_names, saved.training)
    for _ in range(3):
        step(model, optimizer)
        step(other, other_optimizer)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    assert other_optimizer.param_groups[1]["lr"] == 0.1


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_reader_beside_a_writer_finds_one_checkpoint(
    through_a_link: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # so that the writer is as fast as it can be
    if through_a_link:
        folder.rename(tmp_path / "disk")
        folder.symlink_to(tmp_path / "disk")
    done = threading.Event()

    def write() -> None:
        for save in itertools.count(1):
            if done.is_set():
                return
            new = content(float(save))
            checkpoint.write(folder, dataclasses.replace(new, state={"images": save}))

    writer = threading.Thread(target=write)
    checkpoint.write(folder, content(5.0))  # whose state says 5 images, too
    writer.start()
    found: set[int] = set()
    try:
        for i in itertools.count():
            if i >= 200 and len(found) >= 20:
                break
            assert checkpoint.exists(folder)
            if i % 4 == 0:
                found.add(checkpoint.read_state(folder)["images"])
                continue
            read = checkpoint.read(folder, training=i % 2 == 0)
            values = {float(tensor.flatten()[0]) for tensor in (read.weights["a.weight"], *read.training.values())}
            assert values == {float(read.state["images"])}
            found.add(read.state["images"])
    finally:
        done.set()
        writer.join()
