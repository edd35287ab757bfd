from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from glf_fast.errors import UserError
from glf_fast.metrics.vgg16 import IMAGENET_MEAN, IMAGENET_STD, VGG16, load_vgg16


def test_has_torchvisions_names_and_shapes() -> None:
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    expected = {}
    for index, inputs, outputs in zip(convolutions, channels[:-1], channels[1:], strict=True):
        expected[f"features.{index}.weight"] = (outputs, inputs, 3, 3)
        expected[f"features.{index}.bias"] = (outputs,)
    model = VGG16()
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert len(model.features) == 31
    assert [i for i, layer in enumerate(model.features) if isinstance(layer, nn.MaxPool2d)] == [4, 9, 16, 23, 30]


def test_taps_are_the_outputs_of_the_layers_in_the_order_asked_for() -> None:
    torch.manual_seed(0)
    model, x = VGG16(), torch.randn(2, 3, 32, 32)
    taps = [8, 2, 3, 30, 0, 7]
    plain = nn.Sequential(*(nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in model.features))
    for tap, features in zip(taps, model(x, taps), strict=True):
        torch.testing.assert_close(features, plain[: tap + 1](x), rtol=0, atol=0)
    assert model(x, [30])[0].shape == (2, 512, 1, 1)


def test_gradients_reach_the_image() -> None:
    torch.manual_seed(0)
    model = VGG16().double().requires_grad_(False)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: model(v, [2, 3, 7]), (x,), fast_mode=True)


@pytest.mark.parametrize("taps", [[], [31], [-1]])
def test_bad_taps(taps: list[int]) -> None:
    with pytest.raises(ValueError, match="indices in 0 … 30"):
        VGG16()(torch.zeros(1, 3, 32, 32), taps)


def test_grey_images_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"got \(1, 1, 32, 32\); repeat a grey channel"):
        VGG16()(torch.zeros(1, 1, 32, 32), [3])


def test_normalisation_is_that_of_lpips() -> None:
    """(x − shift)/scale for x in [−1, 1], with LPIPS's constants, is ImageNet's normalisation of (x + 1)/2."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    x = torch.linspace(-1, 1, 5)[:, None]
    lpips = (x - torch.tensor([-0.030, -0.088, -0.188])) / torch.tensor([0.458, 0.448, 0.450])
    torch.testing.assert_close(((x + 1) / 2 - mean) / std, lpips, rtol=1e-5, atol=1e-5)


def test_the_imagenet_weights(vgg16_weights: Path) -> None:
    model = load_vgg16(vgg16_weights)
    first = model.features[0]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    expected = [[-0.5537, 0.1427, 0.5290], [-0.5831, 0.3566, 0.7657], [-0.6902, -0.0480, 0.4841]]
    torch.testing.assert_close(first.weight[0, 0], torch.tensor(expected), rtol=0, atol=5e-5)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(FileNotFoundError):
        load_vgg16(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match=r"weights\.safetensors does not hold VGG16 weights"):
        load_vgg16(path)
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(UserError, match=r"weights\.safetensors does not hold VGG16 weights"):
        load_vgg16(path)
