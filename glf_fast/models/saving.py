"""Reading and writing the two files of a model: config.json with shape and settings, model.safetensors with the weights."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from glf_fast.errors import UserError
from glf_fast.files import read_json, save_tensors, write_json

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "beside", "find", "load_weights", "read", "read_tensors", "write"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files into a folder."""
    save_tensors(folder / WEIGHTS_FILE, weights)
    write_json(folder / CONFIG_FILE, config)


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; if the block succeeds, move its files to `folder`. An existing model card stays."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        yield Path(temporary)
        for file in Path(temporary).iterdir():
            if file.name != "README.md" or not (folder / file.name).exists():
                file.replace(folder / file.name)


def find(name_or_path: str | Path, **download: Any) -> Path:
    """The folder itself, or the download of this name from the Hugging Face hub; raises UserError if neither exists."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **download))
    except (HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"there is no folder {name_or_path}, and no such model on the Hugging Face hub ({reason})"
        ) from error


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights in a folder; raises UserError if they are missing, corrupt or pickled."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"{folder} has no {file}{_pickles_in(folder)}; save_pretrained writes this file")
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG_FILE} does not hold a model's settings; restore it from a copy")
    return config, read_tensors(folder / WEIGHTS_FILE)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises UserError if the file is not readable as safetensors."""
    try:
        return load_file(file)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{file} is corrupt: it does not hold readable safetensors ({error}); restore it from a copy"
        ) from error


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Put the weights of a folder into the model that its configuration describes; raises UserError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder / WEIGHTS_FILE} belongs to another {CONFIG_FILE} ({reason}); restore it from a copy"
        ) from error


def _pickles_in(folder: Path) -> str:
    pickles = [
        file.name for file in sorted(folder.iterdir()) if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    ]
    return f" but {', '.join(pickles)}: pickles are never read, because they can execute code" if pickles else ""
