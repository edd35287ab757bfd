"""Glow as a model: pixels to densities and back."""

import math

import pytest
import torch

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


def test_what_cannot_be_built_is_named() -> None:
    with pytest.raises(ValueError, match=r"multiples of 2\^levels = 8; got \(1, 4, 4\)"):
        glow(levels=3)
    with pytest.raises(ValueError, match="log_scale must be one of"):
        glow(log_scale="tan")
    with pytest.raises(ValueError, match=r"log_scale = \"glow\" has no effect with coupling = \"additive\""):
        glow(coupling="additive", log_scale="glow")
