"""CIFAR-10 in its binary version, which needs no pickles."""

from __future__ import annotations

import tarfile

import numpy as np
import torch

from glf_fast.data.dataset import ImageDataset
from glf_fast.data.routes import File, Mirror
from glf_fast.data.source import Files, Source
from glf_fast.errors import UserError

__all__ = ["ARCHIVE", "CIFAR10"]

ARCHIVE = "cifar-10-binary.tar.gz"
# A record is one label byte and 3 × 32 × 32 pixels, channels first.
RECORD = 1 + 3 * 32 * 32
PARTS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}


def read_cifar10(files: Files, split: str, image_size: int | None) -> ImageDataset:
    """uint8 (50000 or 10000, 3, 32, 32) with labels; raises UserError when the archive does not hold whole records."""
    images, labels = [], []
    with tarfile.open(files.path(ARCHIVE)) as members:
        for name in PARTS[split]:
            file = members.extractfile(f"cifar-10-batches-bin/{name}")
            content = file.read() if file else b""
            if not content or len(content) % RECORD:
                raise UserError(
                    f"{name} in {ARCHIVE} has {len(content)} bytes; a whole number of images takes a multiple of {RECORD}"
                )
            records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
            labels.append(records[:, 0].astype(np.int64))
            images.append(records[:, 1:].reshape(-1, 3, 32, 32))
    return ImageDataset.of(
        "cifar10", split, torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))
    )


CIFAR10 = Source(
    name="cifar10",
    title="CIFAR-10: photographs in ten classes, colour",
    licence="none stated; for research",
    citation="Krizhevsky: Learning Multiple Layers of Features from Tiny Images (2009)",
    kind="images",
    shape=(3, 32, 32),
    splits={"train": 50_000, "test": 10_000},
    read=read_cifar10,
    files=(File(ARCHIVE, "md5:c32a1d4ab5d03f1284b67883e8d87530", limit=200_000_000),),  # as published beside it
    routes=(Mirror("https://www.cs.toronto.edu/~kriz"),),
)
