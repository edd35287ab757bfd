"""Answers of a run, for every model of images."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from glf_fast import models
from glf_fast.errors import UserError
from glf_fast.exploring import answers
from glf_fast.exploring.loading import Opened
from glf_fast.images import to_float, to_uint8
from glf_fast.models import HasLikelihood
from glf_fast.training.scoring import bits_per_dim

Build = Callable[..., Opened]
OF_IMAGES = [name for name in models.names() if "images" in models.kind(name).takes]
AUTOENCODERS = {"glf", "vae", "rae", "wae-mmd", "flow-vae", "two-stage-vae", "wae-gan", "alpha-gan"}


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_model_does_what_it_says(name: str, opened: Build) -> None:
    run = opened(name)
    able, image = run.abilities(), run.test.images[0]
    full = {"sample", "nearest", "walk", "interpolate", "edit", "reconstruct"}
    assert set(able) == (full if name in AUTOENCODERS | {"glow"} else {"sample", "nearest", "walk"})

    first, again = (answers.sample(run, 5, 1.0, 3) for _ in range(2))
    assert first.images.shape == (5, 1, 8, 8) and first.images.dtype == torch.uint8 and first.columns == 3
    assert (first.images == again.images).all() and (first.images != answers.sample(run, 5, 1.0, 4).images).any()
    found = answers.nearest(run, run.train.images[7])
    assert (
        found.images[0] == found.images[1]
    ).all() and "distances (root mean square, white is 255): 0.0" in found.lines[1]

    assert run.codes is not None
    axes, origin = ("component 1", "component 2"), run.codes.draw(1.0, torch.Generator().manual_seed(0))
    middle = answers.walk(run, origin, axes, (0.0, 0.0)).images[0]
    away = answers.walk(run, origin, axes, (3.0, -3.0)).images[0]
    plane = answers.plane(run, origin, axes, 3.0).images
    # A batch of another size may be computed in another order: pixels are the same up to a level.
    assert plane.shape[0] == 49 and (plane[24].int() - middle.int()).abs().max() <= 1
    assert (plane[48].int() - away.int()).abs().max() <= 1
    assert (answers.walk(run, origin, (axes[0], axes[0]), (1.0, -1.0)).images[0].int() - middle.int()).abs().max() <= 1

    if "interpolate" in able:
        way = answers.interpolate(run, image, run.test.images[1]).images
        assert way.shape == (9, 1, 8, 8)
    else:
        with pytest.raises(UserError, match="does not interpolate"):
            answers.interpolate(run, image, image)
    if "edit" in able:
        shown, decoded, edited = answers.edit(run, image, {"label 2": 0.0}).images
        assert (shown == image).all() and (decoded == edited).all()
        assert "this run has no Smiling" in answers.edit(run, image, {"Smiling": 1.0}).lines
    if "reconstruct" in able:
        given = answers.reconstruct(run, image)
        assert given.images.shape == (3, 1, 8, 8) and (given.images[0] == image).all()
        assert (given.images[2].int() == 255 - (given.images[1].int() - image.int()).abs()).all()


def test_reconstructions_and_interpolations_are_the_models(opened: Build) -> None:
    run = opened("glf")
    x = to_float(run.test.images[:2])
    rebuilt = to_uint8(run.model.reconstruct(x))
    given = answers.reconstruct(run, run.test.images[0])
    assert (given.images[1].int() - rebuilt[0].int()).abs().max() <= 1
    way = answers.interpolate(run, *run.test.images[:2]).images
    assert (way[[0, -1]].int() - rebuilt.int()).abs().max() <= 1

    with run.model.evaluating():
        density = run.model.flow.log_prob(run.model.encode(x[:1])).item()
        others = run.model.flow.log_prob(run.model.encode(to_float(run.test.images)))
    assert f"log-density of the code: {density:.1f} nats" in given.lines
    assert f"of 40 test images, {int((others < density - 1e-4).sum())} have a less likely code" in given.lines


@pytest.mark.parametrize("name", ["glow", "vae"])
def test_likelihoods_are_those_of_evaluate(name: str, opened: Build) -> None:
    run = opened(name)
    assert isinstance(run.model, HasLikelihood)
    one = dataclasses.replace(run.test, items=run.test.images[:1], labels=None)
    bits = bits_per_dim(run.model, one, 1).item()
    lines = answers.likelihood(run, run.test.images[0])
    assert lines[0] == f"{bits:.3f} bits per dimension ({run.model.words.likelihood}); fewer are more likely"
    others = bits_per_dim(run.model, run.test, 100)
    assert lines[1] == f"of 40 test images, {int((others > bits).sum())} need more"


def test_a_flow_on_pixels_gives_the_image_back(opened: Build) -> None:
    run = opened("glow")
    given = answers.reconstruct(run, run.test.images[0])
    assert (given.images[1].int() - given.images[0].int()).abs().max() <= 1
    assert answers.likelihood(opened("rae"), run.test.images[0]) == []


def test_colder_samples_vary_less(opened: Build) -> None:
    run = opened("glf")
    assert (answers.sample(run, 4, 0.0, 0).images == answers.sample(run, 4, 0.0, 1).images).all()


def test_codes_that_are_not_finite_are_told(opened: Build) -> None:
    run = opened("glf", width=5)
    with torch.no_grad():
        for parameter in run.model.encoder.parameters():
            parameter.fill_(float("nan"))
    assert answers.likelihood(run, run.test.images[0]) == ["the log-density of the code is not finite"]
    with pytest.raises(UserError, match="codes of the training images are not finite"):
        answers.prepare(run)


def test_samples_that_are_not_finite_are_black_and_told(opened: Build) -> None:
    run = opened("glf")
    with torch.no_grad():
        for parameter in run.model.decoder.parameters():
            parameter.fill_(float("nan"))
    given = answers.sample(run, 4, 1.0, 0)
    assert given.lines == ("4 of 4 samples are not finite and have black pixels",) and not given.images.any()
