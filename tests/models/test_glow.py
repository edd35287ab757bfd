"""Glow as a model: pixels to densities and back."""

import math
from collections.abc import Callable

import pytest
import torch

from glf_fast.data import ImageDataset
from glf_fast.models.glow import Glow, GlowSettings

SMALL = {"levels": 1, "steps": 1, "width": 4}


def glow(**settings: object) -> Glow:
    torch.manual_seed(0)
    return Glow((1, 4, 4), GlowSettings(**{**SMALL, **settings}))  # type: ignore[arg-type]


@pytest.mark.parametrize("n_bits", [8, 5])
def test_bits_per_dimension_of_uniform_levels(n_bits: int) -> None:
    """Without a start the flow is a rotation of channels, so p is N(0, I), whose cross-entropy with [−½, ½) is known."""
    model, generator = glow(n_bits=n_bits).eval(), torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2000, 1, 4, 4), generator=generator) / 255
    nats = 0.5 * math.log(2 * math.pi) + 1 / 24
    bits = model.losses(x, generator)["bits_per_dim"].item()
    assert bits == pytest.approx(n_bits + nats / math.log(2), abs=2e-3)
    continuous = (255 * x + torch.rand(x.shape, generator=generator)) / 256
    scored = 8 - model.log_likelihood(continuous, generator).mean().item() / (16 * math.log(2))
    assert scored == pytest.approx(bits + 8 - n_bits, abs=4e-3)


@pytest.mark.parametrize("n_bits", [8, 3])
def test_codes_are_decoded_to_the_same_levels(n_bits: int) -> None:
    model = glow(n_bits=n_bits)
    x = torch.randint(0, 256, (9, 1, 4, 4)) / 255
    model.losses(x)
    levels = (255 * x).round() // 2 ** (8 - n_bits)
    back = model.decode(model.encode(x))
    torch.testing.assert_close(back * (2**n_bits - 1), levels, atol=1e-3, rtol=0)
    assert {0.0, 1.0} <= set(model.decode(40 * torch.randn(9, 1, 4, 4)).flatten().tolist())


CLASSES = {"conditional": True, "classes": (3, 7), "class_sizes": (1, 3)}


def test_a_conditional_model_is_a_mixture_of_its_classes() -> None:
    model = glow(**CLASSES)
    x, labels = torch.randint(0, 256, (40, 1, 4, 4)) / 255, torch.tensor([3, 7]).repeat(20)
    model.losses(x, None, labels)  # the start
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval()
    y, contexts = (255 * x + 0.5) / 256, torch.eye(2)
    apart = torch.stack([model.flow.log_prob(y - 0.5, context) for context in contexts], 1)
    assert (apart[:, 0] - apart[:, 1]).abs().min() > 1e-3
    mixed = torch.logaddexp(apart[:, 0] + math.log(0.25), apart[:, 1] + math.log(0.75))
    torch.testing.assert_close(model.log_likelihood(y), mixed, rtol=1e-4, atol=1e-4)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    given = model.flow.log_prob((255 * x + noise) / 256 - 0.5, contexts[(labels == 7).long()]).mean().item()
    bits = model.losses(x, torch.Generator().manual_seed(0), labels)["bits_per_dim"].item()
    assert bits == pytest.approx(8 - given / (16 * math.log(2)), rel=1e-5)

    codes = model.encode(x)
    assert codes.shape == (40, 18) and torch.equal(codes[:, 17] > 0.5, apart[:, 1] + math.log(3) > apart[:, 0])
    torch.testing.assert_close(model.decode(codes), x, atol=1e-4, rtol=0)
    way = model.interpolate(x[:20], x[20:], 3)
    torch.testing.assert_close(way[:, ::2], torch.stack([x[:20], x[20:]], 1), atol=1e-3, rtol=0)

    def drawn(found: torch.Tensor) -> torch.Tensor:
        return model.sample_classes(found, generator=torch.Generator().manual_seed(0))

    of = [drawn(torch.full((400,), label)) for label in (3, 7)]
    assert (of[0] != of[1]).flatten(1).any(1).float().mean() > 0.9 and torch.equal(drawn(torch.full((400,), 3)), of[0])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(torch.tensor([0.25, 0.75]), 400, replacement=True, generator=generator)
    assert 200 < chosen.sum() < 350 and model.sample(0).shape == (0, 1, 4, 4)
    mixed = model.sample_classes(torch.tensor([3, 7])[chosen], generator=generator)
    assert torch.equal(model.sample(400, generator=torch.Generator().manual_seed(0)), mixed)


def labelled(n: int, labels: torch.Tensor | None = None) -> ImageDataset:
    return ImageDataset.of("one", "train", torch.zeros(n, 1, 1, 1, dtype=torch.uint8), labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GlowSettings(conditional=True).trained_on(labelled(3)),
            "needs a label for each image, and these data have none",
        ),
        (
            lambda: GlowSettings(conditional=True).trained_on(labelled(2000, torch.arange(2000))),
            "at most 1000 classes; got 2000",
        ),
        (
            lambda: GlowSettings(**CLASSES).trained_on(labelled(2, torch.arange(2))),
            r"are \[3, 7\], those of the data \[0, 1\]",
        ),
        (lambda: glow(conditional=True), "needs the labels and sizes of its classes"),
        (lambda: glow(classes=(3, 7), class_sizes=(1, 3)), "classes = .* has no effect with conditional = false"),
        (lambda: glow(**CLASSES | {"classes": (7, 3)}), "those of the training set; leave both out"),
        (lambda: glow(**CLASSES).losses(torch.rand(2, 1, 4, 4)), "conditional: give a label for each of 2 images"),
        (lambda: glow(**CLASSES).sample_classes(torch.tensor([3, 5])), r"among \[3, 7\]; got \[5\]"),
    ],
)
def test_classes_that_do_not_fit_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_built_is_named() -> None:
    with pytest.raises(ValueError, match=r"multiples of 2\^levels = 8; got \(1, 4, 4\)"):
        glow(levels=3)
    with pytest.raises(ValueError, match="log_scale must be one of"):
        glow(log_scale="tan")
    with pytest.raises(ValueError, match=r"log_scale = \"glow\" has no effect with coupling = \"additive\""):
        glow(coupling="additive", log_scale="glow")
