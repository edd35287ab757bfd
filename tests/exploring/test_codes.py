"""Directions in latent spaces."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glf_fast.errors import UserError
from glf_fast.exploring.codes import Codes
from glf_fast.exploring.loading import Opened
from glf_fast.images import to_float, to_uint8

Build = Callable[..., Opened]


@pytest.mark.parametrize("name", ["glf", "glow", "dcgan"])
def test_components_are_the_axes_of_the_codes(name: str, opened: Build) -> None:
    run = opened(name)
    codes = run.codes
    assert codes is not None
    axes = torch.stack([codes.direction(axis) for axis in codes.components]).flatten(1)
    assert axes.shape[0] == 6
    if name == "dcgan":  # its codes are drawn
        drawn = run.model.sample_codes(500, generator=torch.Generator().manual_seed(0))
    else:
        drawn = run.model.encode(to_float(run.train.images))
    rows = (drawn - codes.mean).flatten(1).detach()
    assert rows.mean(0).abs().max() < 1e-4
    axes = axes[axes.norm(dim=1) > 0]  # 4 dimensions have no more components
    lengths, unit = axes.norm(dim=1), axes / axes.norm(dim=1, keepdim=True)
    assert torch.allclose(unit @ unit.T, torch.eye(len(axes)), atol=1e-3)
    assert torch.allclose((rows @ unit.T).std(0), lengths, rtol=1e-3)
    assert (lengths.diff() <= 0).all() and len(axes) == min(6, rows.shape[1])
    total = rows.var(0).sum()
    assert lengths.square().sum() <= total * 1.001 and (len(axes) == 6 or lengths.square().sum() >= total * 0.999)


def test_attributes_are_differences_of_means(opened: Build, tmp_path: Path) -> None:
    run = opened("glf")
    codes, labels = run.codes, run.train.labels
    assert codes is not None and labels is not None
    assert codes.attributes == tuple(f"label {i}" for i in range(10))
    every = run.model.encode(to_float(run.train.images)).detach()
    wanted = every[labels == 3].mean(0) - every[labels != 3].mean(0)
    assert torch.allclose(codes.direction("label 3"), wanted, atol=1e-5)

    table = tmp_path / "a.csv"
    rows = [f"{i},{int(label == 3)},{int(label != 3)},1" for i, label in enumerate(labels)]
    table.write_text("\n".join(["place,three,other,image", *rows]))
    of_file = Codes(run.model, run.train, {name: (table, name) for name in ("three", "other", "image")})
    assert of_file.attributes[:3] == ("three", "other", "image")
    assert torch.allclose(of_file.direction("three"), wanted, atol=1e-5)
    assert torch.allclose(of_file.direction("other"), -wanted, atol=1e-5)
    with pytest.raises(UserError, match="all of the training images have the attribute image"):
        of_file.direction("image")
    with pytest.raises(UserError, match="no direction 'label3'; did you mean 'label 3'"):
        of_file.direction("label3")


def test_moved_codes_are_decoded(opened: Build) -> None:
    run = opened("glf")
    codes = run.codes
    assert codes is not None
    code = codes.encode(run.test.images[:1])[0]
    still, moved = codes.moved(code, [{}, {"component 1": 2.0, "label 3": -1.0}])
    with run.model.evaluating():
        to = code + 2 * codes.direction("component 1") - codes.direction("label 3")
        wanted = to_uint8(run.model.decode(torch.stack([code, to])))
    assert (still == wanted[0]).all() and (moved == wanted[1]).all() and (still != moved).any()


def test_a_model_without_encoder_has_codes_that_it_draws(opened: Build) -> None:
    codes = opened("dcgan").codes
    assert codes is not None and codes.attributes == ()
    image = codes.moved(codes.draw(1.0, torch.Generator().manual_seed(0)), [{}])
    assert image.shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match="has no encoder"):
        codes.encode(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
