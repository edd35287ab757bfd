"""Checkpoints: folders of safetensors and JSON that are complete or absent, and never execute code when read.

model.safetensors      the weights to use: the averaged weights, if there is an average
config.json            the model's shape and settings; with these two, `from_pretrained(folder)` of the model opens the folder
training.safetensors   what resuming needs in addition: optimizer states, and the raw weights if there is an average
checkpoint.json        model, state of training, version of glf_fast, size and SHA-256 of each other file, SHA-256 of all this
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from glf_fast import models
from glf_fast.distributed import by_main, highest
from glf_fast.errors import UserError
from glf_fast.files import parse_json, save_tensors, sha256, write_json
from glf_fast.models import saving
from glf_fast.models.saving import CONFIG_FILE, WEIGHTS_FILE
from glf_fast.settings import fits

__all__ = [
    "Checkpoint",
    "await_same",
    "check_state",
    "exists",
    "load_model",
    "optimizer_tensors",
    "read",
    "restore_optimizer",
    "sweep",
    "write",
]

# Format 2 added the key "version" and changed config.json; models read the configurations of both formats.
_FORMAT, _READABLE = 2, (1, 2)
_TRAINING, _INDEX = "training.safetensors", "checkpoint.json"
_DIGEST = "sha256"
_TRIES = 10  # of a reader beside a writer
# Seconds after which every machine sees what another one has written: NFS looks again after 60 (acdirmax).
_LATE = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint folder.

    Attributes:
        model, config: the model's name, and its shape and settings.
        weights: the weights to use.
        training: tensors that resuming needs in addition; empty if they were not read or do not exist.
        state: images seen, scores and the like; JSON-ready.
    """

    model: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    state: dict[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in `folder` by another one.

    The new checkpoint is written to a temporary folder and renamed once it is on the disk, so that at every moment one complete
    checkpoint exists.

    Raises:
        UserError: the folder holds something else than a checkpoint, which stays.
        OSError: the checkpoint could not be written (disk full …); the old checkpoint stays.
    """
    place, folder = folder, _behind_links(folder)
    if folder.exists() and not (folder / _INDEX).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} would be replaced by a checkpoint, but holds something else; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(place)
    previous, temporary = _previous(folder), _new(folder)
    if temporary.exists():
        raise UserError(
            f"{temporary} is where a checkpoint is written; move it away, or delete it if a killed process left it"
        )
    try:
        temporary.mkdir()
        saving.write(temporary, checkpoint.config, checkpoint.weights)
        if checkpoint.training:
            save_tensors(temporary / _TRAINING, checkpoint.training)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(temporary.iterdir())
        }
        index = {"format": _FORMAT, "version": version("glf_fast"), "model": checkpoint.model}
        index |= {"state": checkpoint.state, "files": files}
        write_json(temporary / _INDEX, index | {_DIGEST: _digest(index)})
        _flush(temporary)
        # No portable system call swaps folders, so the old folder is renamed first; `read` looks for it under that name, too.
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space" in str(error)
        remedy = "free disk space and run the same command again" if full else "run the same command again"
        raise OSError(
            f"{folder} could not be written ({error}); the previous checkpoint, if any, is intact: {remedy}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a process left beside a checkpoint when it was killed while it wrote one.

    Where a link leads to a folder that holds no checkpoint, what is beside it is somebody else's.
    """
    place, folder = folder, _behind_links(folder)
    holds = (folder / _INDEX).is_file()
    if holds:  # otherwise the previous checkpoint may be the one to read
        shutil.rmtree(_previous(folder), ignore_errors=True)
    if holds or not place.is_symlink():
        shutil.rmtree(_new(folder), ignore_errors=True)


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint, whole or damaged, in `folder`; an empty folder is none."""
    # Twice, because the folder may be replaced between the two looks.
    return _is_filled(folder) or _previous(folder).is_dir() or _is_filled(folder)


def await_same(folder: Path) -> None:
    """Wait until all processes find the same checkpoint in `folder`, or all none.

    Raises:
        UserError: they still do not after a minute, in which a shared file system shows what another machine has written.
    """
    until = time.monotonic() + _LATE
    while True:
        found = _mark(folder) if exists(folder) else None
        mark = int(hashlib.sha256(found[1]).hexdigest()[:15], 16) if found else 0
        largest, smallest, over = highest(mark, -mark, time.monotonic() > until)
        if largest == -smallest:
            return
        if over:
            raise UserError(
                f"the processes do not find the same checkpoint in {folder}; choose a folder that all machines share"
            )
        time.sleep(0.2)


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, without its tensors; raises UserError as `read` does."""
    return _settled(folder, lambda place: _index(place, _bytes(place, _INDEX)))["state"]


def check_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Raise UserError unless the state of a checkpoint has what every run writes into it."""
    kinds: dict[str, Any] = {"epoch": (int, float), "minutes": (int, float), "data": str}
    if missing := [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]:
        raise UserError(f"{folder / _INDEX} is damaged: its state has no {', '.join(missing)}; {_remedy(folder)}")


def read(folder: Path, *, training: bool = False) -> Checkpoint:
    """Read a checkpoint, with the tensors for resuming if `training`; the bytes read are compared with their checksums first.

    Another process may replace the checkpoint meanwhile: what is returned is one checkpoint, the old or the new one.

    Raises:
        UserError: the checkpoint is missing or corrupt, or was written without the tensors for resuming.
    """
    return _settled(folder, lambda place: _read(place, training))


def _read(folder: Path, training: bool) -> Checkpoint:
    names = [CONFIG_FILE, WEIGHTS_FILE, *([_TRAINING] if training else [])]
    with contextlib.ExitStack() as stack:
        # All are opened at once: a file that is open stays when a newer checkpoint replaces its folder.
        files = {name: stack.enter_context(_opened(folder, name)) for name in (_INDEX, *names)}
        index = _index(folder, files[_INDEX].read())

        def checked(name: str) -> bytes:
            recorded, content = index["files"].get(name), files[name].read()
            if recorded is None:
                raise UserError(f"{folder / name} is not in {_INDEX}; {_remedy(folder)}")
            if (len(content), hashlib.sha256(content).hexdigest()) != (recorded["bytes"], recorded["sha256"]):
                raise UserError(
                    f"{folder / name} is corrupt: its size or SHA-256 is not the one in {_INDEX}; {_remedy(folder)}"
                )
            return content

        config, weights = saving.decode(folder, checked(CONFIG_FILE), checked(WEIGHTS_FILE))
        more = saving.decode_tensors(folder / _TRAINING, checked(_TRAINING)) if training else {}
    return Checkpoint(index["model"], config, weights, more, index["state"])


def load_model(folder: Path, device: torch.device) -> tuple[models.GenerativeModel, dict[str, Any]]:
    """The model in a checkpoint, in eval mode on `device`, and the state of its training.

    Of several processes, process 0 reads: a shared file system shows others what it has just written only after a while.
    """
    checkpoint = by_main(read)(folder)
    with torch.random.fork_rng(devices=[]):
        model = models.build(checkpoint.model, checkpoint.config)
    saving.load_weights(model, checkpoint.weights, folder)
    return model.to(device).eval(), checkpoint.state


# -- optimizers -----------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The state of the optimizer as tensors, by the names "optimizer.{parameter's name}.{key}"."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"optimizer.{names[parameter]}.{key}": value
        for parameter in parameters
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Load the tensors of `optimizer_tensors` into the optimizer; its learning rate and other settings stay unchanged."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for position, parameter in enumerate(parameters):
        prefix = f"optimizer.{names[parameter]}."
        entries = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if entries:
            state[position] = entries
    # load_state_dict moves each tensor to the device and dtype that the optimizer needs.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# -- files ----------------------------------------------------------------------------------------------------------------


def _previous(folder: Path) -> Path:
    folder = _behind_links(folder)
    return folder.with_name(f".{folder.name}-previous")


def _new(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-new")


def _behind_links(folder: Path) -> Path:
    """The folder that holds the checkpoint: `folder` may be a link to another disk."""
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder  # resolve() fails in circles of links


def _is_filled(folder: Path) -> bool:
    try:
        return folder.is_dir() and any(folder.iterdir())
    except FileNotFoundError:  # it is being replaced
        return False


def _complete(folder: Path) -> Path:
    """The folder that holds the complete checkpoint: `folder`, or the previous one if a write was interrupted."""
    if not exists(folder):
        raise UserError(f"there is no checkpoint {folder}; python -m glf_fast.train writes checkpoints")
    return folder if folder.is_dir() else _previous(folder)


def _remedy(folder: Path) -> str:
    return f"restore it from a copy, or delete {folder} and train again"


def _settled(folder: Path, read: Callable[[Path], T]) -> T:
    """The result of `read` for the folder of the complete checkpoint; asked again if the checkpoint was replaced meanwhile.

    An error counts if the index was the same before and after it, or if the tenth try fails, too.
    """
    for tried in range(_TRIES):
        before = _mark(folder)
        try:
            return read(_complete(folder))
        except UserError:
            if tried == _TRIES - 1 or (before is not None and before == _mark(folder)):
                raise
            time.sleep(0.001 * 2**tried)  # half a second in all
    raise AssertionError


def _mark(folder: Path) -> tuple[Path, bytes] | None:
    """Place and index, by which a checkpoint is told from the next one, and from itself aside; None amid a rename."""
    try:
        place = _complete(folder)
        return place, (place / _INDEX).read_bytes()
    except (UserError, OSError):
        return None


def _opened(folder: Path, name: str) -> BinaryIO:
    try:
        return (folder / name).open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder / name} is missing; {_remedy(folder)}") from None


def _bytes(folder: Path, name: str) -> bytes:
    with _opened(folder, name) as file:
        return file.read()


def _index(folder: Path, content: bytes) -> dict[str, Any]:
    """The index in the bytes of its file."""
    index = parse_json(content, folder / _INDEX)
    if isinstance(index, dict) and "format" in index and index["format"] not in _READABLE:
        raise UserError(
            f"{folder / _INDEX} was written by glf_fast {index.get('version', 'of an unknown version')} in format "
            f"{index['format']}; this is {version('glf_fast')}, which reads {' and '.join(map(str, _READABLE))}: use the "
            "version that wrote it, or, if the file is damaged, a copy of it"
        )
    kinds = {"model": str, "state": dict, "files": dict}
    if (
        not isinstance(index, dict)
        or not all(isinstance(index.get(name), kind) for name, kind in kinds.items())
        or not all(isinstance(file, dict) and {"bytes", "sha256"} <= set(file) for file in index["files"].values())
        or not isinstance(index["state"].get("images"), int)
        or not all(map(fits, index["state"].values()))
    ):
        raise UserError(f"{folder / _INDEX} is not the index of a checkpoint; {_remedy(folder)}")
    recorded = index.pop(_DIGEST, None)  # version 0.1.0 wrote none
    if recorded is not None and recorded != _digest(index):
        raise UserError(f"{folder / _INDEX} is damaged: its checksum differs; {_remedy(folder)}")
    return index


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _flush(folder: Path) -> None:
    """Wait until a folder's list of files is on the disk; the contents of the files already are."""
    if os.name == "nt":  # Windows opens no folders, and its file system writes their lists in order
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
