"""scikit-learn's digits: 1,797 real digits of 8 × 8 pixels that come with the library. For tests and first tries."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from glf_fast.data.dataset import ImageDataset, split_off_test
from glf_fast.data.source import Files, Source
from glf_fast.errors import UserError

__all__ = ["DIGITS"]

POLICY = "scikit-learn's digits, 0 … 16 scaled to 0 … 255; test: a tenth of a fixed random order"


def read_digits(files: Files, split: str, image_size: int | None) -> ImageDataset:
    """uint8 (1617 or 180, 1, 8, 8) with labels. Raises UserError when scikit-learn is not installed."""
    images, labels = split_off_test("digits", *_all_digits(), split)
    return ImageDataset.of("digits", split, images, labels, POLICY)


@cache
def _all_digits() -> tuple[Tensor, Tensor]:
    """uint8 (1797, 1, 8, 8) and labels, which scikit-learn parses from text for a tenth of a second."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from error
    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images)[:, None] * (255 / 16)
    return images.round().to(torch.uint8), torch.from_numpy(bunch.target)


DIGITS = Source(
    name="digits",
    title="scikit-learn's digits: handwritten digits in ten classes, grey",
    licence="BSD-3-Clause (scikit-learn); UCI's data CC BY 4.0",
    citation="Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI (1998)",
    kind="images",
    shape=(1, 8, 8),
    splits={"train": 1_617, "test": 180},
    read=read_digits,
)
