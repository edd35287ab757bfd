import copy
import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from glf_fast.errors import UserError
from glf_fast.models import GLF
from glf_fast.models.flow_settings import FlowSettings
from glf_fast.models.glf import GLFSettings

Build = Callable[..., GLF]


@pytest.fixture
def saved(small_glf: Build, images: Tensor, tmp_path: Path) -> Path:
    model = small_glf()
    model.losses(images)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("flow", [{"steps": 2, "hidden": [8]}, {"kind": "rnvp", "blocks": 2, "hidden": 8, "seed": 5}])
def test_round_trip(small_glf: Build, images: Tensor, tmp_path: Path, flow: dict) -> None:
    model = small_glf(flow=flow, latent_noise=0.1, reconstruction="l1", beta=2.0).to(memory_format=torch.channels_last)
    model.losses(images)
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = GLF.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    samples = [m.sample(4, generator=torch.Generator().manual_seed(0)) for m in (model, loaded)]
    assert torch.equal(*samples)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("change", [GLF.double, GLF.bfloat16, lambda model: model.encoder.double() and model])
def test_dtypes_come_back_as_they_were_saved(small_glf: Build, tmp_path: Path, change: Callable[[GLF], GLF]) -> None:
    model = change(small_glf())
    model.save_pretrained(tmp_path)
    loaded = GLF.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype and torch.equal(loaded.state_dict()[name], tensor), name


def test_a_copy_is_independent_and_equal(small_glf: Build, images: Tensor) -> None:
    model = small_glf()
    model.losses(images)
    twin = copy.deepcopy(model)
    assert twin.config == model.config
    with torch.no_grad():
        twin.encoder.head.weight.zero_()
    assert model.encoder.head.weight.any()


def test_a_full_disk_loses_nothing(small_glf: Build, saved: Path) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    ours = resource.getrlimit(resource.RLIMIT_FSIZE)  # what Python's start made of a file's limit: an error, no signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, ours[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*model\.safetensors"):
            small_glf(latent_dim=6).save_pretrained(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, ours)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_saving_again_replaces_the_model_and_keeps_the_card(small_glf: Build, saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    small_glf(latent_dim=6).save_pretrained(saved)
    assert GLF.from_pretrained(saved).settings.latent_dim == 6
    assert (saved / "README.md").read_text() == "mine"


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_refused_and_never_run(saved: Path, tmp_path: Path, name: str) -> None:
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    message = (
        "no model.safetensors but pytorch_model.bin: pickles" if name.endswith("bin") else "model.safetensors is corr"
    )
    with pytest.raises(UserError, match=message):
        GLF.from_pretrained(saved)
    assert not (tmp_path / "exploded").exists()


def damage_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "does not hold a model's settings"),
        (damage_config(colour="blue"), "unknown key 'colour'"),
        (damage_config(shape=None), "cannot be built"),
        (damage_config(latent_dim=5), "belongs to another config.json .*size mismatch"),
        (damage_config(flow={"steps": 3, "hidden": [8]}), "belongs to another config.json"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-100]
            ),
            "model.safetensors is corrupt",
        ),
    ],
)
def test_damaged_folders(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(saved)
    with pytest.raises(UserError, match=message) as caught:
        GLF.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_weights_and_settings_of_two_models_are_told_apart(
    small_glf: Build, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed between the two files leaves shapes that fit, and settings that do not."""
    rename, before = Path.replace, (saved / "model.safetensors").read_bytes()

    def killed(self: Path, target: Path) -> Path:
        if target == saved / "config.json":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        small_glf(beta=2.0, flow={"steps": 2, "hidden": [8], "activation": "tanh"}).save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() != before
    with pytest.raises(UserError, match=r"not the file that config.json was written with"):
        GLF.from_pretrained(saved)


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    flow = FlowSettings(hidden=(np.int64(8),), clamp=np.float32(2))
    model = GLF(
        (1, 8, 8), GLFSettings(latent_dim=np.int64(4), width=4, hidden=np.int32(8), beta=np.float64(1), flow=flow)
    )
    model.save_pretrained(tmp_path)
    assert GLF.from_pretrained(tmp_path).settings == model.settings


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere, and no such model"):
        GLF.from_pretrained(tmp_path / "nowhere")
