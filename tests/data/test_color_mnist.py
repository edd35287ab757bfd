"""ColorMNIST: the digits keep their shapes, colours are fixed and equally many, and every image's mode can be read from it."""

import dataclasses
import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from glf_fast.data import Source
from glf_fast.data.color_mnist import COLOR_MNIST, PALETTE, color_of
from glf_fast.data.idx import MNIST, idx_files
from glf_fast.data.source import Files


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def digits(tmp_path: Path) -> tuple[Source, Path]:
    """ColorMNIST of 40 + 30 random images in MNIST's files, and their folder."""
    rng, hashes = np.random.default_rng(0), {}
    for prefix, n in (("train", 40), ("t10k", 30)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", (np.arange(n) % 10).astype(np.uint8))):
            name, payload = f"{prefix}-{kind}-ubyte", idx(array)
            hashes[name] = hashlib.sha256(payload).hexdigest()
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(payload))
    return dataclasses.replace(COLOR_MNIST, files=idx_files(hashes)), tmp_path


def test_digits_are_tinted_and_labels_are_their_modes(digits: tuple[Source, Path]) -> None:
    source, folder = digits
    palette = torch.tensor(list(PALETTE.values()))
    for split, count in (("train", 40), ("test", 30)):
        colored, again = source.load(split, folder), source.load(split, folder)
        grey = MNIST.read(Files(source, folder, False), split, None)
        assert colored.items.shape == (count, 3, 28, 28) and colored.items.dtype == torch.uint8
        assert colored.labels is not None and grey.labels is not None
        colors, classes = colored.labels // 10, colored.labels % 10
        assert torch.equal(classes, grey.labels) and colors.bincount().tolist() == [count // 10] * 10
        assert torch.equal(colored.items, grey.items.int() * palette[colors][:, :, None, None] // 255)
        assert torch.equal(colored.items.amax(1, keepdim=True), grey.items), "every colour has a full channel"
        assert torch.equal(color_of(colored.items), colors) and torch.equal(color_of(colored.items / 255), colors)
        assert colored.fingerprint == again.fingerprint != grey.fingerprint
    assert not torch.equal(*(source.load(split, folder).items[:30] for split in ("train", "test")))


def test_black_images_have_some_color_and_faint_ones_their_own() -> None:
    assert color_of(torch.zeros(2, 3, 4, 4)).shape == (2,)
    faint = 0.01 * torch.tensor(list(PALETTE.values()))[:, :, None, None].expand(-1, -1, 4, 4) / 255
    assert color_of(faint).tolist() == list(range(10))


def test_the_files_are_those_of_mnist() -> None:
    assert COLOR_MNIST.cache == MNIST.cache and COLOR_MNIST.files == MNIST.files and COLOR_MNIST.routes == MNIST.routes
