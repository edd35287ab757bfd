"""CIFAR-10 in its binary version: no pickles."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from glf_fast.data.dataset import ImageDataset
from glf_fast.data.fetch import Attempt, check_hash, download, first, published
from glf_fast.errors import UserError
from glf_fast.files import cache_dir

__all__ = ["ARCHIVE", "load_cifar10", "parse_cifar10"]

ARCHIVE = "cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as published beside it
MIRRORS = (f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",)
# A record is one label byte and 3 × 32 × 32 pixels, channels first.
RECORD = 1 + 3 * 32 * 32
PARTS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}


def load_cifar10(split: str, data_dir: Path | None = None, download: bool = True) -> ImageDataset:
    """uint8 (50000 or 10000, 3, 32, 32), found in `data_dir` or the cache, or fetched and verified."""
    path = first(
        "the data set cifar10",
        _attempts(data_dir, download),
        f"Put {ARCHIVE} into a folder and pass --data-dir FOLDER, or into {_cache()}",
    )
    return parse_cifar10(path.read_bytes(), split)


def _cache() -> Path:
    return cache_dir() / "data" / "cifar10"


def _attempts(data_dir: Path | None, online: bool) -> Iterator[Attempt]:
    if data_dir is not None:
        yield Attempt(
            f"--data-dir {data_dir}", lambda: published(Path(data_dir) / ARCHIVE, given_by_user=True, md5=MD5)
        )
    target = _cache() / ARCHIVE
    yield Attempt(f"the cache {target.parent}", lambda: published(target, md5=MD5))
    for url in MIRRORS if online else ():
        yield Attempt(url, lambda url=url: download(url, target, lambda file: check_hash(file, ARCHIVE, md5=MD5)))  # type: ignore[misc]


def parse_cifar10(archive: bytes, split: str) -> ImageDataset:
    """The split from the archive's bytes; raises UserError when it does not hold whole records."""
    images, labels = [], []
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for name in PARTS[split]:
            file = members.extractfile(f"cifar-10-batches-bin/{name}")
            content = file.read() if file else b""
            if not content or len(content) % RECORD:
                raise UserError(f"{name} in {ARCHIVE} has {len(content)} bytes, which is no whole number of images")
            records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
            labels.append(records[:, 0].astype(np.int64))
            images.append(records[:, 1:].reshape(-1, 3, 32, 32))
    return ImageDataset.of(
        "cifar10", split, torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))
    )
