import pytest
import torch
from torch import nn

from glf_fast.models.autoencoder import Decoder, Encoder, check_image_shape


@pytest.mark.parametrize(
    ("shape", "latent_dim", "millions"),
    [((1, 28, 28), 20, 13.18), ((3, 32, 32), 64, 17.21), ((3, 64, 64), 64, 67.61)],
)
def test_parameter_counts_of_the_paper(shape: tuple[int, int, int], latent_dim: int, millions: float) -> None:
    with torch.device("meta"):
        networks = Encoder(shape, latent_dim), Decoder(shape, latent_dim)
    count = sum(p.numel() for network in networks for p in network.parameters())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("network", [Encoder, Decoder])
def test_start(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    for name, parameter in network((3, 16, 16), 20, 32, 128).named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.002, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:  # gains of the batch norms
            assert (parameter == 1).all(), name


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (2, 12, 20)])
def test_shapes_and_range(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    z = Encoder(shape, 5, 4, 16)(torch.rand(3, *shape))
    assert z.shape == (3, 5)
    x = Decoder(shape, 5, 4, 16)(1e4 * z)
    assert x.shape == (3, *shape)
    assert x.min() >= 0 and x.max() <= 1
    assert x.std() > 0.001


def test_codes_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    encoder, decoder = Encoder((1, 8, 8), 5, 4, 16), Decoder((1, 8, 8), 5, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(torch.rand(64, 1, 8, 8))
        x = decoder(z)
    assert z.dtype == x.dtype == torch.float32
    assert (z != z.bfloat16()).float().mean() > 0.9  # not a rounded bf16 code


def test_sizes_that_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"multiples of 4 .*got 30 × 50: .*32 × 48"):
        Encoder((3, 30, 50), 8)
    with pytest.raises(ValueError, match="image_shape must be"):
        Decoder((28, 28), 8)
    with pytest.raises(ValueError, match="image_shape must be"):
        check_image_shape((0, 28, 28))
    assert check_image_shape([3, 64, 64]) == (3, 64, 64)
