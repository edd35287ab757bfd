"""Models of digits to explore: untrained ones in memory, and two runs trained for seconds."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from glf_fast import models, train
from glf_fast.data import ImageDataset, as_images, load
from glf_fast.exploring.codes import Codes, has_codes
from glf_fast.exploring.loading import Opened
from glf_fast.models import GenerativeModel

Once = Callable[[str, Callable[[Path], object]], Path]


def small(name: str, shape: tuple[int, ...] = (1, 8, 8), **settings: object) -> GenerativeModel:
    """An untrained model of a registered name, the same one every time."""
    fields = models.kind(name).Settings.__dataclass_fields__
    sizes = {"latent_dim": 4, "width": 4, "levels": 2, "steps": 1}
    sizes = {key: size for key, size in sizes.items() if key in fields}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.build(name, {"shape": list(shape), **sizes, **settings}).eval()


@pytest.fixture(scope="session")
def digits() -> tuple[ImageDataset, ImageDataset]:
    """150 training and 40 test images of digits."""
    train, test = (as_images(load("digits", split)) for split in ("train", "test"))
    of = ImageDataset.of
    return (
        of("digits", "train", train.images[:150], train.labels[:150]),
        of("digits", "test", test.images[:40], test.labels[:40]),
    )


@pytest.fixture(scope="session")
def opened(digits: tuple[ImageDataset, ImageDataset]) -> Callable[..., Opened]:
    """opened(name, **settings): an untrained model and the digits."""

    def build(name: str, **settings: object) -> Opened:
        model = small(name, **settings)
        return Opened(name, model, *digits, Codes(model, digits[0]) if has_codes(model) else None)

    return build


def _trained(once: Once, name: str, *arguments: str | Path) -> Path:
    """A finished run, trained by one of all test workers."""
    cache = once("cache", Path.mkdir)

    def finished(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GLF_FAST_CACHE", str(cache))
            patch.setattr(sys, "argv", ["train", *map(str, arguments), "--out", str(folder)])
            train.main()

    return once(name, finished)


@pytest.fixture(scope="session")
def smoke(once: Once) -> Path:
    """A run of preset smoke on 8 × 8 digits, the same as that of tests/training; not to be changed."""
    return _trained(once, "smoke", "--preset", "smoke")


@pytest.fixture(scope="session")
def coloured(once: Once) -> Path:
    """A flow on the pixels of 12 × 12 coloured images, trained for a few steps; not to be changed."""

    def write(path: Path) -> None:
        noise = torch.rand(80, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        images = torch.nn.functional.interpolate(noise, scale_factor=4.0, mode="bilinear")
        with path.open("wb") as file:
            np.save(file, (images * 255).byte().numpy())

    small = ("--preset", "glow-digits", "--epochs", "1", "--batch-size", "20", "--model.steps", "1")
    small += ("--score.samples", "20", "--data.source", once("coloured.npy", write))
    return _trained(once, "coloured", *small)
