"""Small classifiers, shipped with the package, whose features and classes give scores without any download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from glf_fast.errors import UserError

__all__ = ["TINY_MNIST_WEIGHTS", "TINY_SIZE", "TINY_WEIGHTS", "TinyNet", "load_tiny"]

TINY_SIZE = 28
TINY_WEIGHTS = Path(__file__).with_name("tiny.safetensors")
TINY_MNIST_WEIGHTS = Path(__file__).with_name("tiny_mnist.safetensors")


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class TinyNet(nn.Module):
    """Four convolutions, and a linear classifier of the channel means after the fourth.

    The features are channel means after the second (texture) and the fourth (content) convolution: 128 with the usual widths.
    `tools/train_tiny.py` trains the network on images in random colours. It then sets `mean` and `std` so that every feature
    has mean 0 and variance 1 on the training set. A Fréchet distance is therefore in squared standard deviations of real
    images.

    Args:
        widths: channels after each convolution.
        classes: number of classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, widths: Sequence[int] = (32, 64, 96, 64), classes: int = 10) -> None:
        super().__init__()
        first, second, third, fourth = widths
        self.split, self.dim = second, second + fourth
        self.texture = nn.Sequential(*_layer(3, first, 5, stride=2), *_layer(first, second, 3))
        self.content = nn.Sequential(*_layer(second, third, 3, stride=2), *_layer(third, fourth, 3))
        self.head = nn.Linear(fourth, classes)
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("std", torch.ones(self.dim))

    def pooled(self, x: Tensor) -> Tensor:
        """Channel means (B, dim) of images x (B, 3, 28, 28) in [0, 1], before standardisation."""
        texture = self.texture(x)
        return torch.cat([texture.mean((2, 3)), self.content(texture).mean((2, 3))], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Standardised features (B, dim) of images x (B, 3, 28, 28) in [0, 1]."""
        return (self.pooled(x) - self.mean) / self.std

    def classify(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images x (B, 3, 28, 28) in [0, 1]."""
        return self.head(self.pooled(x)[:, self.split :])

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, classes) from the result of `forward`, computed in float64, so that no TF32 can touch them."""
        pooled = features.double() * self.std.double() + self.mean.double()
        weight, bias = self.head.weight.double(), self.head.bias.double()
        return nn.functional.linear(pooled[:, self.split :], weight, bias).float()


def load_tiny(weights: Path = TINY_WEIGHTS) -> TinyNet:
    """A network that `tools/train_tiny.py` has trained, in eval mode and without gradients.

    Raises:
        FileNotFoundError: no file at `weights`.
        UserError: the file holds another network.
    """
    try:
        state = load_file(weights)
        widths = [len(state[f"{part}.{layer}.weight"]) for part in ("texture", "content") for layer in (0, 3)]
        model = TinyNet(widths, len(state["head.bias"]))
        model.load_state_dict(state)
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{weights} holds no network of tools/train_tiny.py ({str(error).splitlines()[0]}); train it again"
        ) from error
    return model.eval().requires_grad_(False)
