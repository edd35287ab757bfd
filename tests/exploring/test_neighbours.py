"""Nearest training images, against a search through all of them."""

import pytest
import torch

from glf_fast.exploring.neighbours import Neighbours
from glf_fast.metrics.nearest import nearest


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12), (1, 28, 28), (3, 20, 9)])
@pytest.mark.parametrize("smooth", [True, False])
def test_the_nearest_ones_are_found(shape: tuple[int, ...], smooth: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(700, *shape, generator=generator)
    if smooth:
        images = torch.nn.functional.interpolate(images[..., :3, :3], shape[1:], mode="bilinear")
    images = (images * 255).byte()
    training, images = images[:690], images[690:]
    search = Neighbours(training)
    for image in images:
        found = search.nearest(image, 7)
        distances = (training.double() - image.double()).square().mean((1, 2, 3)).sqrt()
        wanted, places = distances.topk(7, largest=False)
        assert torch.allclose(found.distances.double(), wanted, rtol=1e-5)
        assert found.places.tolist() == places.tolist()
    flat = nearest(images.flatten(1), [training.flatten(1)])
    assert flat.number.tolist() == [int(search.nearest(image, 1).places) for image in images]


def test_copies_and_few_images() -> None:
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = Neighbours(images).nearest(images[3], 7)
    assert found.places[0] == 3 and found.distances[0] == 0 and sorted(found.places.tolist()) == [0, 1, 2, 3, 4]
    assert Neighbours(images).usual(images) == 0
