"""What every source of images becomes: one uint8 tensor with a name, a split and a fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from glf_fast.errors import UserError

__all__ = ["SPLITS", "ImageDataset", "check_split", "split_off_test"]

SPLITS = ("train", "test")


@dataclass(frozen=True)
class ImageDataset:
    """A whole split in memory.

    Attributes:
        name: the source's name or path. split: "train" or "test".
        images: uint8 (N, C, H, W), C = 1 or 3.
        labels: int64 (N,), or None.
        fingerprint: SHA-256 over shape, pixels and policy.
        policy: how files became these pixels (crop, resize, split), in words.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor | None
    fingerprint: str
    policy: str = ""

    @classmethod
    def of(cls, name: str, split: str, images: Tensor, labels: Tensor | None = None, policy: str = "") -> ImageDataset:
        """Check the images and take their fingerprint."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise UserError(
                f"{name} must hold uint8 images (N, 1 or 3, H, W), N ≥ 1; got {images.dtype} {tuple(images.shape)}"
            )
        digest = hashlib.sha256(f"{tuple(images.shape)} {policy}".encode())
        digest.update(images.contiguous().numpy().data)
        return cls(name, split, images, labels, digest.hexdigest(), policy)


def check_split(split: str) -> None:
    """Raise UserError unless the split is "train" or "test"."""
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")


def split_off_test(images: Tensor, labels: Tensor | None, split: str) -> tuple[Tensor, Tensor | None]:
    """For sources without a test split: a tenth (rounded up) of a fixed random order is the test split, the rest trains.

    Both keep the order of the files.
    """
    n = len(images)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    test = -(-n // 10)
    chosen = (order[n - test :] if split == "test" else order[: n - test]).sort().values
    if not len(chosen):
        raise UserError(f"{n} image(s) cannot be split into training and test images; give at least two")
    return images[chosen], None if labels is None else labels[chosen]
