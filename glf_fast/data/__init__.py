"""Data sets: find, fetch, verify, load. A whole split is one tensor of images, rows or tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from glf_fast.data.arrays import load_arrays
from glf_fast.data.celeba import CELEBA
from glf_fast.data.cifar10 import CIFAR10
from glf_fast.data.color_mnist import COLOR_MNIST
from glf_fast.data.dataset import (
    CONTENTS,
    SPLITS,
    Dataset,
    ImageDataset,
    Kind,
    TableDataset,
    TokenDataset,
    as_images,
    check_split,
)
from glf_fast.data.digits import DIGITS
from glf_fast.data.expressions import EXPRESSIONS
from glf_fast.data.folder import load_folder
from glf_fast.data.idx import FASHION_MNIST, MNIST
from glf_fast.data.source import Source
from glf_fast.data.strings import load_smiles, load_strings
from glf_fast.data.tables import load_csv, load_parquet
from glf_fast.errors import UserError, check_text, did_you_mean

__all__ = [
    "CONTENTS",
    "SOURCES",
    "SPLITS",
    "Dataset",
    "ImageDataset",
    "Kind",
    "Source",
    "TableDataset",
    "TokenDataset",
    "as_images",
    "expected_kind",
    "load",
    "names",
    "resizes",
]

# The registry of public data sets.
SOURCES: dict[str, Source] = {
    source.name: source for source in (FASHION_MNIST, MNIST, COLOR_MNIST, CIFAR10, CELEBA, DIGITS, EXPRESSIONS)
}

# Readers of the user's files by their endings; folders and zips hold images.
_READERS: dict[str, Callable[[Path, str], Dataset]] = {
    ".npy": load_arrays,
    ".npz": load_arrays,
    ".csv": load_csv,
    ".parquet": load_parquet,
    ".smi": load_smiles,
    ".txt": load_strings,
}
_FILES = "folders or .zip files of images, .npy, .npz, .csv, .parquet, .smi and .txt files"
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib")


def names() -> tuple[str, ...]:
    """Names of the public data sets."""
    return tuple(SOURCES)


def load(
    source: str,
    split: str = "train",
    *,
    data_dir: Path | None = None,
    image_size: int | None = None,
    skip_unusable: bool = False,
    download: bool = True,
) -> Dataset:
    """A split of a public data set by name, or of the user's own data by path.

    Args:
        source: one of `names()`, or the path of a folder or zip of images, or of a .npy, .npz, .csv, .parquet, .smi or
            .txt file.
        split: "train" or "test". Files without a test split give a tenth of a fixed random order.
        data_dir: folder with the files of a public data set, which is searched first; or the folder of your own relative path.
        image_size: for folders, zips and CelebA: resize the central square to this many pixels.
        skip_unusable: for folders and zips: leave out files that cannot be read as images, and count them.
        download: whether a public data set may be fetched.

    Raises:
        UserError: unknown name, missing or damaged files, no network. The message says what was tried and what to do.
    """
    check_split(split)
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be ≥ 1; got {image_size}")
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder")
    if data_dir is not None:
        check_text("--data-dir", str(data_dir))  # protocols of scores hold it
    if skip_unusable and (source in SOURCES or Path(source).suffix.lower() in _READERS):
        raise UserError(
            f"skip_unusable is for folders and zips of images; {source} is neither, so leave the option out"
        )
    if source in SOURCES:
        return SOURCES[source].load(split, data_dir, image_size=image_size, download=download)
    path = _find(source, data_dir)
    ending = path.suffix.lower()
    if path.is_dir() or ending == ".zip":
        return load_folder(path, split, image_size, skip_unusable=skip_unusable)
    if image_size is not None:
        raise UserError(f"image_size is for folders and zips of images, and for CelebA; {source} is neither")
    if ending in _PICKLES:
        raise UserError(
            f"{source} is a pickle by its name; pickles are never loaded, because they can execute code; "
            "save arrays with numpy.save or numpy.savez"
        )
    if ending not in _READERS:
        raise UserError(f"{source} is in no known format; the known formats are {_FILES}")
    return _READERS[ending](path, split)


def expected_kind(source: str) -> Kind:
    """The kind of a data set by its name or ending, without reading it; of .npy and .npz files, which hold any kind, images."""
    if source in SOURCES:
        return SOURCES[source].kind
    kinds: dict[str, Kind] = {".csv": "table", ".parquet": "table", ".smi": "tokens", ".txt": "tokens"}
    return kinds.get(Path(source).suffix.lower(), "images")


def resizes(source: str) -> bool:
    """Whether `load` takes an `image_size` for this source: CelebA, and what may be a folder or a zip of images."""
    return SOURCES[source].resizes if source in SOURCES else Path(source).suffix.lower() not in _READERS


def _find(source: str, data_dir: Path | None) -> Path:
    """The user's data at the path `source`; a relative path is one from here, or from `data_dir` if that is given."""
    path = Path(os.path.expanduser(source))  # of Path, the method raises for users that do not exist
    if data_dir is not None:
        if path.is_absolute():
            raise UserError(f"{source} has no files to look for in --data-dir {data_dir}; leave the option out")
        if not (data_dir / path).exists():
            raise UserError(f"there is no data set and no path {source!r} in --data-dir {data_dir}")
        return data_dir / path
    if not source or not path.exists():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(
            f"no data set or path {source!r}{where}; {did_you_mean(source, SOURCES)}there are {', '.join(SOURCES)}, and paths "
            f"of your own data: {_FILES}"
        )
    return path
