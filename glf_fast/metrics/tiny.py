"""A small classifier of Fashion-MNIST, shipped with the package, whose features give a score without any download."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["TINY_SIZE", "TINY_WEIGHTS", "TinyNet", "load_tiny"]

TINY_SIZE = 28
TINY_WEIGHTS = Path(__file__).with_name("tiny.safetensors")


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class TinyNet(nn.Module):
    """Four convolutions. The 128 features are channel means after the second (texture) and the fourth (content) convolution.

    `tools/train_tiny.py` trains the network on clothes in random colours. It then sets `mean` and `std` so that every feature
    has mean 0 and variance 1 on the training set. A Fréchet distance is therefore in squared standard deviations of real
    images.
    """

    dim = 128
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.texture = nn.Sequential(*_layer(3, 32, 5, stride=2), *_layer(32, 64, 3))
        self.content = nn.Sequential(*_layer(64, 96, 3, stride=2), *_layer(96, 64, 3))
        self.head = nn.Linear(64, 10)
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("std", torch.ones(self.dim))

    def pooled(self, x: Tensor) -> Tensor:
        """Channel means (B, 128) of images x (B, 3, 28, 28) in [0, 1], before standardisation."""
        texture = self.texture(x)
        return torch.cat([texture.mean((2, 3)), self.content(texture).mean((2, 3))], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Standardised features (B, 128) of images x (B, 3, 28, 28) in [0, 1]."""
        return (self.pooled(x) - self.mean) / self.std

    def classify(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of the classes of Fashion-MNIST."""
        return self.head(self.pooled(x)[:, 64:])


def load_tiny() -> TinyNet:
    """The trained network from the package, in eval mode and without gradients."""
    model = TinyNet()
    model.load_state_dict(load_file(TINY_WEIGHTS))
    return model.eval().requires_grad_(False)
