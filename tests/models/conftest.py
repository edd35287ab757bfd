"""Small models that the tests of this folder share."""

from collections.abc import Callable

import pytest
import torch

from glf_fast.models import GLF


@pytest.fixture
def small_glf() -> Callable[..., GLF]:
    """Builder of a GLF for 8 × 8 grey images with a few thousand parameters, the same ones every time."""

    def build(**settings: object) -> GLF:
        defaults = {"latent_dim": 4, "width": 4, "hidden": 16, "flow": {"steps": 2, "hidden": [8]}}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return GLF.from_config({"shape": [1, 8, 8], **defaults, **settings})

    return build


@pytest.fixture
def images() -> torch.Tensor:
    """32 smooth grey images (32, 1, 8, 8) in [0, 1]."""
    noise = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, scale_factor=2.0, mode="bilinear")
