"""Scores and pictures of a model that is known exactly, on data sorted by class."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from glf_fast import metrics
from glf_fast.data import ImageDataset
from glf_fast.models import GenerativeModel, ModelSettings, Words
from glf_fast.training import pictures
from glf_fast.training.scoring import evaluate


class Copier(GenerativeModel):
    """Reconstructs perfectly; its samples are noise."""

    words = Words("Copier")

    def __init__(self) -> None:
        super().__init__((1, 8, 8), ModelSettings())
        self.weight = nn.Parameter(torch.zeros(()))

    def sample(self, n: int, *, generator: torch.Generator | None = None, **options: object) -> Tensor:
        return torch.rand(n, 1, 8, 8, generator=generator)

    def reconstruct(self, x: Tensor) -> Tensor:
        return x

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        return torch.lerp(x0[:, None], x1[:, None], torch.linspace(0, 1, steps)[:, None, None, None])


def by_class(split: str, n: int, seed: int) -> ImageDataset:
    """Ten classes, one after the other, each of its own grey."""
    noise = torch.randint(0, 30, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    grey = torch.arange(n) * 10 // n * 20
    return ImageDataset.of("sorted", split, (noise + grey[:, None, None, None]).to(torch.uint8))


@pytest.mark.parametrize("n", [100, 400])
def test_perfect_reconstructions_of_sorted_images_score_as_perfect(n: int) -> None:
    train, test = by_class("train", 1000, 0), by_class("test", 400, 1)
    [score] = evaluate(Copier(), train, test, [metrics.extractor("tiny")], n=n)
    perfect, floors = score["reconstructions"], score["samples"]["floors"]
    assert perfect["value"] < 1e-3 * floors["train/test"], "the images are the reference's own"
    if n == 400:  # in the order of the files it would be 4.0, in the reference's order -0.21
        assert abs(perfect["kid"]["mean"]) < 0.1


def test_pictures_show_all_classes_and_are_large_enough(tmp_path: Path) -> None:
    test = by_class("test", 400, 1)
    drawn = pictures.draw_pictures(Copier(), test.images, seed=0)
    real = drawn["reconstructions"][0, 2:10]  # the first row
    assert len({int(value) // 20 for value in real.unique() if value < 255}) > 6
    pictures.save_picture(tmp_path, "interpolations", torch.zeros(1, 152, 362, dtype=torch.uint8), 0)
    with Image.open(tmp_path / "interpolations" / pictures.picture_name(0)) as png:
        assert png.width == 724
