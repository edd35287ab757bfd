"""A model's files, known here alone: model.safetensors, and config.json with shape, settings and the weights' SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from glf_fast.errors import UserError
from glf_fast.files import parse_json, save_tensors, sha256, write_json

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "beside", "decode", "decode_tensors", "find", "load_weights", "read", "write"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_DIGEST = "weights_sha256"


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files into a folder."""
    save_tensors(folder / WEIGHTS_FILE, weights)
    write_json(folder / CONFIG_FILE, {**config, _DIGEST: sha256(folder / WEIGHTS_FILE)})


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends well, move its files to `folder`. A model card that is there stays.

    Weights are moved before the configuration, which holds their hash: after a kill in between, the two do not fit, and
    `read` says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".saving-*"):  # of a process that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        yield Path(temporary)
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == CONFIG_FILE):
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
    return decode(folder, (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())


def decode(folder: Path, config_bytes: bytes, weights_bytes: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights from the bytes of both files, so that those checked are those used; errors as in `read`."""
    config = parse_json(config_bytes, folder / CONFIG_FILE)
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG_FILE} does not hold a model's settings; restore it from a copy")
    digest = config.pop(_DIGEST, None)  # version 0.1.0 wrote none
    if digest is not None and digest != hashlib.sha256(weights_bytes).hexdigest():
        raise UserError(
            f"{folder / WEIGHTS_FILE} is corrupt, or not the file that {CONFIG_FILE} was written with: its SHA-256 differs; "
            "restore both from a copy"
        )
    return config, decode_tensors(folder / WEIGHTS_FILE, weights_bytes)


def decode_tensors(file: Path, content: bytes) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file; raises UserError, naming the file, if they are not readable as such."""
    try:
        return load(content)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{file} is corrupt: it does not hold readable safetensors ({error}); restore it from a copy"
        ) from error


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Put the weights of a folder into the model that its configuration describes, which takes their dtypes.

    Raises UserError if they do not fit.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        saved = weights.get(name)
        if (
            saved is not None
            and saved.is_floating_point()
            and tensor.is_floating_point()
            and saved.dtype != tensor.dtype
        ):
            tensor.data = tensor.data.to(saved.dtype)
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
