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
from glf_fast.training.scoring import evaluate, likelihood, table


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


class Histogram(Copier):
    """All pixels are independent, and level k has probability `weights[k]`."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def log_likelihood(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (256 * self.weights[(256 * x).long()]).log().flatten(1).sum(1)


def test_bits_per_dimension_are_those_of_the_levels() -> None:
    test = by_class("test", 1200, 1)  # more than one batch
    test.images[0, 0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    weights = (torch.arange(256) % 7 + 1.0) / (torch.arange(256) % 7 + 1.0).sum()
    bits = -weights[test.images.long()].log2().flatten(1).mean(1)
    found = likelihood(Histogram(weights), test, 1200)
    assert found is not None
    assert found["value"] == pytest.approx(bits.mean().item(), rel=1e-6)
    error = bits.std().item() / 1200**0.5
    assert found["interval"] == pytest.approx([found["value"] - 1.96 * error, found["value"] + 1.96 * error], rel=1e-6)
    assert found["median"] == pytest.approx(bits.median().item(), rel=1e-6)
    assert likelihood(Copier(), test, 10) is None


def test_a_likelihood_stands_below_the_scores_once() -> None:
    train, test = by_class("train", 100, 0), by_class("test", 100, 1)
    weights = torch.full((256,), 1 / 256)
    scores = evaluate(Histogram(weights), train, test, [metrics.extractor("tiny")] * 2, n=100)
    assert table(scores).splitlines()[3:] == ["bits per dimension: 8.000 (95 %: 8.000 … 8.000), median 8.000, exact"]
    weights[100:] = 0  # some pixels are impossible
    [score] = evaluate(Histogram(weights), train, test, [metrics.extractor("tiny")], n=100)
    assert score["likelihood"]["value"] is None and table([score]).endswith("bits per dimension: not finite")


def test_pictures_show_all_classes_and_are_large_enough(tmp_path: Path) -> None:
    test = by_class("test", 400, 1)
    drawn = pictures.draw_pictures(Copier(), test.images, seed=0)
    real = drawn["reconstructions"][0, 2:10]  # the first row
    assert len({int(value) // 20 for value in real.unique() if value < 255}) > 6
    pictures.save_picture(tmp_path, "interpolations", torch.zeros(1, 152, 362, dtype=torch.uint8), 0)
    with Image.open(tmp_path / "interpolations" / pictures.picture_name(0)) as png:
        assert png.width == 724
