"""Checkpoints: folders of safetensors and JSON that are whole or not there, and never run code when read.

model.safetensors      the weights to use (averaged ones, if there is an average)
config.json            the model's constructor arguments; with these two, `GLF.from_pretrained(folder)` opens the folder
training.safetensors   what resuming needs besides: optimizer state, and the raw weights if averaged ones are above
checkpoint.json        the model's name, the state of training, and the size and SHA-256 of each other file
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from glf_fast import models
from glf_fast.errors import UserError
from glf_fast.files import read_json, save_tensors, sha256, write_json

__all__ = ["Checkpoint", "exists", "load_model", "optimizer_tensors", "read", "restore_optimizer", "write"]

_FORMAT = 1
_MODEL, _CONFIG, _TRAINING, _INDEX = "model.safetensors", "config.json", "training.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        model, config: name of the model and its constructor's arguments.
        weights: to use.    training: tensors that resuming needs besides; empty if not asked for or not there.
        state: images seen, scores and the like; JSON.
    """

    model: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    state: dict[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Put a checkpoint in the place of the one in `folder`.

    It is written beside and renamed into place once it is on the disk: at every moment there is one whole checkpoint.

    Raises:
        OSError: it could not be written (disk full …); the old one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    previous, temporary = _previous(folder), folder.with_name(f".{folder.name}-new")
    shutil.rmtree(temporary, ignore_errors=True)  # of a writer that was killed
    try:
        temporary.mkdir()
        save_tensors(temporary / _MODEL, checkpoint.weights)
        write_json(temporary / _CONFIG, checkpoint.config)
        if checkpoint.training:
            save_tensors(temporary / _TRAINING, checkpoint.training)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(temporary.iterdir())
        }
        index = {"format": _FORMAT, "model": checkpoint.model, "state": checkpoint.state, "files": files}
        write_json(temporary / _INDEX, index)
        _flush(temporary)
        # No system call swaps folders everywhere, so the old one steps aside; `read` looks for it there too.
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        temporary.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        raise OSError(
            f"{folder} could not be written ({error}); what was there is unharmed: make room, and run the same command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint in `folder`."""
    return folder.is_dir() or _previous(folder).is_dir()


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint alone; raises UserError as `read`."""
    return _index(_whole(folder))["state"]


def read(folder: Path, *, training: bool = False) -> Checkpoint:
    """Read a checkpoint, with what resuming needs if `training`; every file is compared with its checksum first.

    Raises:
        UserError: there is none, it is corrupt, or it was made for use only.
    """
    folder = _whole(folder)
    index = _index(folder)
    for name in [_MODEL, _CONFIG, *([_TRAINING] if training else [])]:
        file, recorded = folder / name, index["files"].get(name)
        if recorded is None or not file.is_file():
            raise UserError(f"{file} is missing; {_remedy(folder)}")
        if file.stat().st_size != recorded["bytes"] or sha256(file) != recorded["sha256"]:
            raise UserError(f"{file} is corrupt: its size or SHA-256 is not the one in {_INDEX}; {_remedy(folder)}")
    try:
        weights = load_file(folder / _MODEL)
        more = load_file(folder / _TRAINING) if training else {}
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder} does not hold readable safetensors ({error}); {_remedy(folder)}") from error
    return Checkpoint(index["model"], read_json(folder / _CONFIG), weights, more, index["state"])


def load_model(folder: Path, device: torch.device) -> tuple[models.GenerativeModel, dict[str, Any]]:
    """The model in a checkpoint, in eval mode on `device`, and the state of its training."""
    checkpoint = read(folder)
    with torch.random.fork_rng(devices=[]):
        model = models.build(checkpoint.model, checkpoint.config)
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise UserError(
            f"the weights in {folder} do not fit the model in its {_CONFIG}: {' '.join(str(error).split())}"
        ) from error
    return model.to(device).eval(), checkpoint.state


# -- optimizers -----------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state as tensors called "optimizer.{parameter's name}.{key}"."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"optimizer.{names[parameter]}.{key}": value
        for parameter in parameters
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Undo `optimizer_tensors`; learning rates and other settings stay the optimizer's own."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for position, parameter in enumerate(parameters):
        prefix = f"optimizer.{names[parameter]}."
        entries = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if entries:
            state[position] = entries
    # load_state_dict brings each tensor to the device and type that the optimizer wants it in.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# -- files ----------------------------------------------------------------------------------------------------------------


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-previous")


def _whole(folder: Path) -> Path:
    """Where the checkpoint of `folder` is at this moment."""
    if not exists(folder):
        raise UserError(f"there is no checkpoint {folder}; python -m glf_fast.train makes them")
    return folder if folder.is_dir() else _previous(folder)


def _remedy(folder: Path) -> str:
    return f"restore it from a copy, or delete {folder} to train anew"


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = read_json(folder / _INDEX)
    except FileNotFoundError:
        raise UserError(f"{folder / _INDEX} is missing; {_remedy(folder)}") from None
    kinds = {"model": str, "state": dict, "files": dict}
    if (
        not isinstance(index, dict)
        or index.get("format") != _FORMAT
        or not all(isinstance(index.get(name), kind) for name, kind in kinds.items())
        or not all(isinstance(file, dict) and {"bytes", "sha256"} <= set(file) for file in index["files"].values())
    ):
        raise UserError(f"{folder / _INDEX} is not of this version's format ({_FORMAT}); {_remedy(folder)}")
    return index


def _flush(folder: Path) -> None:
    """Wait until a folder's list of files is on the disk; theirs already is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
