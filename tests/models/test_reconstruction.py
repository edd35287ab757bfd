from pathlib import Path

import pytest
import torch
from torch import Tensor

from glf_fast.metrics.vgg16 import VGG16, load_vgg16
from glf_fast.models import perceptual as perceptual_module
from glf_fast.models.perceptual import perceptual
from glf_fast.models.reconstruction import reconstruction_loss

X = torch.tensor([[0.0, 0.5], [1.0, 0.25]]).view(2, 1, 1, 2)
X_HAT = torch.tensor([[0.5, 0.5], [0.75, 0.75]]).view(2, 1, 1, 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mse", (0.25 + 0.0625 + 0.25) / 2),
        ("l1", (0.5 + 0.25 + 0.5) / 2),
        # −log ½ twice, −log ¾, and −¼·log ¾ − ¾·log ¼
        ("bce", (2 * 0.693147 + 0.287682 + 0.25 * 0.287682 + 0.75 * 1.386294) / 2),
    ],
)
def test_sum_over_pixels_mean_over_batch(name: str, expected: float) -> None:
    loss = reconstruction_loss(name, X_HAT, X)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(reconstruction_loss(name, X_HAT.repeat(3, 1, 1, 1), X.repeat(3, 1, 1, 1)), loss)


def test_bce_of_saturated_pixels_is_finite_also_under_autocast() -> None:
    x_hat = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = reconstruction_loss("bce", x_hat, torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(200)  # log 0 counts as −100
    assert x_hat.grad is not None and x_hat.grad.isfinite().all()


def test_unknown_loss_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'mse', 'bce', 'l1', 'perceptual'; got 'l2'"):
        reconstruction_loss("l2", X_HAT, X)


@pytest.fixture(scope="module")
def random_vgg16() -> VGG16:
    torch.manual_seed(0)
    return VGG16().eval().requires_grad_(False)


def authors_distance(network: VGG16, x_hat: Tensor, x: Tensor, levels: int) -> Tensor:
    """What the released code computes, in-place ReLUs and all."""

    def maps(image: Tensor) -> list[Tensor]:
        ids, stored = [2, 7, 12, 21][:levels], []
        for i in range(ids[-1] + 1):
            image = network.features[i](image)
            if i in ids:
                stored.append(image)  # not a copy: the next layer, an in-place ReLU, overwrites it
        return stored

    if x.shape[1] == 1:
        mean = std = torch.full((3, 1, 1), 0.5)
    else:
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    first, second = ((image.repeat(1, 3 // image.shape[1], 1, 1) - mean) / std for image in (x_hat, x))
    pairs = [(first, second), *zip(maps(first.clone()), maps(second.clone()), strict=True)]
    return torch.stack([(a - b).abs().sum() for a, b in pairs]).sum()


@pytest.mark.parametrize(
    ("shape", "levels"), [((2, 1, 28, 28), 3), ((2, 3, 32, 32), 3), ((1, 3, 64, 64), 4), ((3, 1, 8, 8), 3)]
)
def test_perceptual_is_the_authors_distance(random_vgg16: VGG16, shape: tuple[int, ...], levels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x_hat, x = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    expected = authors_distance(random_vgg16, x_hat, x, levels)
    torch.testing.assert_close(perceptual(x_hat, x, random_vgg16), expected, rtol=1e-5, atol=0)
    assert perceptual(x, x, random_vgg16) == 0


def test_perceptual_gradient_reaches_the_reconstruction_alone(random_vgg16: VGG16) -> None:
    generator = torch.Generator().manual_seed(1)
    x_hat = torch.rand(1, 1, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()
    x = torch.rand(1, 1, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()
    network = VGG16().double()
    network.load_state_dict(random_vgg16.state_dict())
    network.requires_grad_(False)
    perceptual(x_hat, x, network).backward()
    assert x.grad is None and x_hat.grad is not None
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        step = 1e-7 * direction
        slope = (perceptual(x_hat + step, x, network) - perceptual(x_hat - step, x, network)) / 2e-7
    assert (x_hat.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_perceptual_finds_vgg16_by_itself(vgg16_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the ImageNet weights a blur is worse than a change of brightness with the same squared error."""
    loads = []
    monkeypatch.setattr(perceptual_module, "load_vgg16", lambda: loads.append(1) or load_vgg16(vgg16_weights))
    perceptual_module._imagenet_vgg16.cache_clear()
    x = torch.zeros(1, 1, 28, 28)
    x[..., 4:24:4, 6:22] = 0.5
    blurred = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    brighter = x + (blurred - x).square().mean().sqrt()
    assert reconstruction_loss("perceptual", blurred, x) > 1.3 * reconstruction_loss("perceptual", brighter, x)
    assert len(loads) == 1
    perceptual_module._imagenet_vgg16.cache_clear()
