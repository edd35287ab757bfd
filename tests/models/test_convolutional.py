import pytest
import torch
from torch import nn

from glf_fast.models import GLF, VAE
from glf_fast.models.convolutional import ConvolutionalDecoder, ConvolutionalEncoder


@pytest.mark.parametrize(
    ("shape", "latent_dim", "encoder", "decoder"),
    [
        # Convolutions k²·in·out, their biases, two numbers a channel of a batch norm, and the dense layers, by hand.
        ((1, 32, 32), 16, 11_083_408, 11_606_273),
        ((3, 32, 32), 128, 11_546_368, 18_954_499),
        ((3, 64, 64), 64, 18_267_200, 21_475_331),
    ],
)
def test_parameter_counts_at_the_papers_width(
    shape: tuple[int, int, int], latent_dim: int, encoder: int, decoder: int
) -> None:
    with torch.device("meta"):
        networks = ConvolutionalEncoder(shape, latent_dim), ConvolutionalDecoder(shape, latent_dim)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [encoder, decoder]
    channels = [layer.out_channels for layer in networks[0].features if isinstance(layer, nn.Conv2d)]
    assert channels == [128, 256, 512, 1024]


@pytest.mark.parametrize(
    "shape", [(1, 4, 4), (1, 8, 8), (3, 28, 28), (2, 12, 20), (3, 64, 64), (1, 72, 80), (1, 32, 96)]
)
def test_shapes_and_range(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    z = ConvolutionalEncoder(shape, 5, 4)(torch.rand(3, *shape))
    assert z.shape == (3, 5)
    x = ConvolutionalDecoder(shape, 5, 4)(1e3 * z)
    assert x.shape == (3, *shape) and x.min() >= 0 and x.max() <= 1 and x.std() > 0.001


def test_every_pixel_reaches_the_code_and_is_drawn() -> None:
    torch.manual_seed(0)
    for size in (28, 64):
        encoder, decoder = (
            ConvolutionalEncoder((1, size, size), 3, 4).eval(),
            ConvolutionalDecoder((1, size, size), 3, 4),
        )
        x = torch.rand(1, 1, size, size, requires_grad=True)
        [gradient] = torch.autograd.grad(encoder(x).sum(), x)
        assert (gradient != 0).float().mean() > 0.95
        assert decoder.eval()(torch.randn(20, 3)).std(0).min() > 0


def test_paddings_are_those_of_tensorflow() -> None:
    """`same` as TensorFlow documents it: ⌈n/s⌉ outputs, max((⌈n/s⌉ − 1)·s + k − n, 0) zeros, the odd one behind."""
    encoder = ConvolutionalEncoder((1, 28, 28), 3, 4)
    assert [layer.padding for layer in encoder.features if isinstance(layer, nn.ZeroPad2d)] == [
        (1, 1, 1, 1),
        (1, 1, 1, 1),
        (1, 2, 1, 2),
        (1, 1, 1, 1),
    ]
    large = ConvolutionalEncoder((1, 64, 64), 3, 4)
    assert all(layer.padding == (1, 2, 1, 2) for layer in large.features if isinstance(layer, nn.ZeroPad2d))


def test_codes_are_float32_under_autocast_and_float64_in_double_precision() -> None:
    torch.manual_seed(0)
    encoder, decoder = ConvolutionalEncoder((1, 8, 8), 5, 4), ConvolutionalDecoder((1, 8, 8), 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(torch.rand(64, 1, 8, 8))
        x = decoder(z)
    assert z.dtype == x.dtype == torch.float32
    assert (z != z.bfloat16()).float().mean() > 0.9  # not a rounded bf16 code
    assert decoder.double()(encoder.double()(x.double())).dtype == torch.float64


def test_sizes_that_work_are_named() -> None:
    for network in (ConvolutionalEncoder, ConvolutionalDecoder):
        with pytest.raises(ValueError, match=r"multiples of 4 \(28, 32, 64, 128, …\); got 30 × 50: .*32 × 48"):
            network((3, 30, 50), 8)
        with pytest.raises(ValueError, match=r"multiples of 8 \(32, 64, 128, …\); got 100 × 68: .*96 × 64"):
            network((3, 100, 68), 8)


@pytest.mark.parametrize("kind", [GLF, VAE])
def test_every_model_may_have_these_networks(kind: type[GLF] | type[VAE]) -> None:
    config = {"shape": [1, 8, 8], "latent_dim": 4, "width": 4, "networks": "rae"}
    model = kind.from_config(config)
    model(torch.rand(4, 1, 8, 8))
    assert isinstance(model.encoder, ConvolutionalEncoder) and "hidden" not in model.config
    assert kind.from_config(model.config).config == model.config
    before = {
        name: value for name, value in kind.from_config({"shape": [1, 8, 8]}).config.items() if name != "networks"
    }
    assert kind.from_config(before).settings.networks == "infogan", "configurations from before there was a choice"
