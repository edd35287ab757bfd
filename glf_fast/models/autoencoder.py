"""Encoder and decoder with the networks of InfoGAN, which several autoencoders share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Decoder", "Encoder", "check_image_shape"]


def check_image_shape(image_shape: Sequence[int], multiple: int = 4) -> tuple[int, int, int]:
    """(C, H, W) as integers; raises ValueError, with the sizes that work, unless H and W are multiples of `multiple`."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (channels, height, width); got {tuple(image_shape)}")
    channels, height, width = map(int, image_shape)
    if height % multiple or width % multiple:
        nearest = " × ".join(str(max(multiple, multiple * round(size / multiple))) for size in (height, width))
        sizes = ", ".join(str(size) for size in (28, 32, 64, 128) if size % multiple == 0)
        raise ValueError(
            f"the networks' layers halve or double images, so height and width must be multiples of {multiple} ({sizes}, …); "
            f"got {height} × {width}: resize the images, for instance to {nearest}"
        )
    return channels, height, width


class Encoder(nn.Module):
    """Encoder of InfoGAN (arXiv:1606.03657), as in the appendix of arXiv:1905.10485: images (B, C, H, W) in [0, 1] → codes.

    Conv(C, w, 4, stride 2)–ReLU–Conv(w, 2w, 4, stride 2)–BN–ReLU–Linear(2w·H/4·W/4, hidden)–BN–ReLU–Linear(hidden, latent).
    Weights start as N(0, 0.02²), biases as 0.

    Args:
        image_shape: (C, H, W), H and W multiples of 4.
        latent_dim: D of the codes.
        width: w, channels after the first convolution; 64 in the paper.
        hidden: units of the dense layer; 1024 in the paper.
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int, width: int = 64, hidden: int = 1024) -> None:
        super().__init__()
        channels, rows, columns = check_image_shape(image_shape)
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (rows // 4) * (columns // 4), hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, latent_dim)
        self.apply(_start)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → z (B, latent_dim), float32 or better also under autocast."""
        h = self.features(x)
        # A bf16 code has 8 bits, so the flow would learn the grid of rounded values.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(h.to(self.head.weight.dtype))


class Decoder(nn.Module):
    """Decoder: codes (B, latent_dim) → images (B, C, H, W) in [0, 1]. It mirrors the encoder, and ends with 0.5·tanh + 0.5.

    Linear(latent, hidden)–BN–ReLU–Linear(hidden, 2w·H/4·W/4)–BN–ReLU–ConvT(2w, w, 4, stride 2)–BN–ReLU–ConvT(w, C, 4,
    stride 2).
    Arguments and initial weights are those of `Encoder`.
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int, width: int = 64, hidden: int = 1024) -> None:
        super().__init__()
        channels, rows, columns = check_image_shape(image_shape)
        smallest = (2 * width, rows // 4, columns // 4)
        units = smallest[0] * smallest[1] * smallest[2]
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, units),
            nn.BatchNorm1d(units),
            nn.ReLU(),
            nn.Unflatten(1, smallest),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
        )
        self.apply(_start)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) → x̂ (B, C, H, W) in [0, 1], float32 or better."""
        h = self.layers(z)
        # With the perceptual loss, the decoder of the released code gives [−1, 1], although the targets reach beyond ±2 on
        # colour images; min-max scaling of each sample hides this. In glf_fast images are in [0, 1] everywhere, and a loss
        # normalises both images that it compares.
        return 0.5 * torch.tanh(h.to(torch.promote_types(h.dtype, torch.float32))) + 0.5


def _start(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(layer.weight, std=0.02)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
