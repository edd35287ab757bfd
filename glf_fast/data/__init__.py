"""Data sets: find, fetch, verify, load. A whole split is one uint8 tensor; nothing here knows a model."""

from __future__ import annotations

from pathlib import Path

from glf_fast.data.arrays import load_arrays
from glf_fast.data.celeba import load_celeba
from glf_fast.data.cifar10 import load_cifar10
from glf_fast.data.dataset import SPLITS, ImageDataset, check_split
from glf_fast.data.digits import load_digits
from glf_fast.data.folder import load_folder
from glf_fast.data.idx import FASHION_MNIST, MNIST
from glf_fast.errors import UserError, did_you_mean

__all__ = ["SPLITS", "ImageDataset", "load", "names"]

_NAMES = ("fashion-mnist", "mnist", "cifar10", "celeba", "digits")


def names() -> tuple[str, ...]:
    """The public data sets there are."""
    return _NAMES


def load(
    source: str,
    split: str = "train",
    *,
    data_dir: Path | None = None,
    image_size: int | None = None,
    download: bool = True,
) -> ImageDataset:
    """A split of a data set by name, or of your own images by path.

    Args:
        source: one of `names()`, or the path of a folder or zip of images, a .npy or a .npz file.
        split: "train" or "test". Sources of your own without a test split give a tenth of a fixed random order.
        data_dir: folder with a public set's files, looked at first.
        image_size: for folders, zips and CelebA: resize the central square to this many pixels.
        download: whether a public set may be fetched.

    Raises:
        UserError: unknown name, missing or damaged files, no network: the message says what was tried and what to do.
    """
    check_split(split)
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be ≥ 1; got {image_size}")
    path = Path(source).expanduser()
    if data_dir is not None:
        if not data_dir.is_dir():
            raise UserError(f"--data-dir {data_dir} is not a folder")
        if source == "digits" or (source not in _NAMES and path.exists()):
            raise UserError(f"{source} looks for no files in --data-dir {data_dir}; leave it out")
    if source == "celeba":
        return load_celeba(split, image_size, data_dir, download)
    if source not in _NAMES and (path.is_dir() or (path.suffix.lower() == ".zip" and path.is_file())):
        return load_folder(path, split, image_size)
    if image_size is not None:
        raise UserError(f"{source} has its own image size; image_size is for folders and zips of images, and CelebA")
    if source == "fashion-mnist":
        return FASHION_MNIST.load(split, data_dir, download)
    if source == "mnist":
        return MNIST.load(split, data_dir, download)
    if source == "cifar10":
        return load_cifar10(split, data_dir, download)
    if source == "digits":
        return load_digits(split)
    if path.suffix.lower() in (".npy", ".npz") and path.is_file():
        return load_arrays(path, split)
    if path.is_file():
        raise UserError(f"{source} is no folder, .zip, .npy or .npz of images")
    hint = did_you_mean(source, _NAMES)
    raise UserError(
        f"no data set or path {source!r}; {hint}there are {', '.join(_NAMES)}, and paths of your own images"
    )
