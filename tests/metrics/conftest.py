"""Fixtures of the tests of scores."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from glf_fast import metrics
from glf_fast.data import ImageDataset
from glf_fast.metrics.inception import FIDInception


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone."""
    monkeypatch.setenv("GLF_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny() -> metrics.Extractor:
    return metrics.extractor("tiny")


@pytest.fixture(scope="session")
def blobs() -> Callable[..., torch.Tensor]:
    """blobs(n, seed, level=128): uint8 (n, 1, 28, 28), a bright spot of random place and size on a dark ground."""

    def make(n: int, seed: int, level: int = 128) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x, y, size = (
            torch.rand(3, n, 1, 1, generator=generator) * torch.tensor([16.0, 16.0, 5.0])[:, None, None, None]
        ) + 5
        grid = torch.arange(28.0)
        squared = (grid[:, None] - y).square() + (grid - x).square()
        return (level * torch.exp(-squared / size.square())).to(torch.uint8)[:, None]

    return make


@pytest.fixture(scope="session")
def dataset(blobs: Callable[..., torch.Tensor]) -> Callable[..., ImageDataset]:
    """dataset(split, n, seed): blobs as a data set."""

    def make(split: str, n: int, seed: int) -> ImageDataset:
        return ImageDataset.of("blobs", split, blobs(n, seed))

    return make


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Inception weights in the published form: a state dict without batch counters."""
    torch.manual_seed(0)
    model = FIDInception()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "random_inception.pth"
    torch.save({key: value for key, value in model.state_dict().items() if "num_batches" not in key}, path)
    return path
