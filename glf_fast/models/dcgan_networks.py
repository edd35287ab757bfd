"""Networks of DCGAN, which the adversarial models share: encoder, decoder and discriminators of images and of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from glf_fast.models.autoencoder import check_image_shape

__all__ = ["CodeDiscriminator", "DCGANDecoder", "DCGANEncoder", "InfoGANDiscriminator", "Norm"]

# Images are halved as long as both sides have at least so many pixels afterwards: 64 and 32 to 4, 28 to 7.
_LEAST = 4
# Slope of the leaky ReLUs.
_SLOPE = 0.2

# The normalisation of a discriminator. layer: for gradient penalties, which need outputs that depend on one image alone.
Norm = Literal["batch", "layer"]


class DCGANEncoder(nn.Module):
    """Discriminator of DCGAN (Radford, Metz, Chintala, arXiv:1511.06434), and the encoder made of it: images → numbers.

    n blocks Conv(4, stride 2)–BN–LeakyReLU(0.2) with w, 2w, 4w, … channels, the first one without BN, then a dense layer. Each
    halves the image; 64 × 64 pixels have four blocks, 32 × 32 three and 28 × 28 two. Images are scaled to [−1, 1] first. The
    paper's convolutions are 5 × 5. Weights start as N(0, 0.02²), biases as 0.

    Args:
        image_shape: (C, H, W), H and W multiples of 4.
        outputs: numbers for an image.
        width: w, channels after the first convolution; 128 in the paper, for images of 64 × 64.
        norm: normalisation of the blocks; "layer" is layer norm, with a gain and an offset for each channel.
    """

    def __init__(self, image_shape: Sequence[int], outputs: int, width: int = 64, norm: Norm = "batch") -> None:
        super().__init__()
        channels, rows, columns = check_image_shape(image_shape)
        count, layers = _halvings(rows, columns), list[nn.Module]([_ChannelsLast()])
        for i in range(count):
            filters = width * 2**i
            layers.append(nn.Conv2d(channels, filters, 4, stride=2, padding=1))
            layers += [_norm2d(filters, norm), nn.LeakyReLU(_SLOPE)] if i else [nn.LeakyReLU(_SLOPE)]
            channels = filters
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * (rows >> count) * (columns >> count), outputs)
        self.apply(_start)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, outputs), float32 or better also under autocast."""
        return _headed(self.head, self.features(2 * x - 1))


class DCGANDecoder(nn.Module):
    """Generator of DCGAN: codes (B, latent_dim) → images (B, C, H, W) in [0, 1]. It mirrors `DCGANEncoder`.

    Linear–BN–ReLU to the smallest images, then blocks ConvT(4, stride 2)–BN–ReLU that double them and halve the channels; the
    last one ends with 0.5·tanh + 0.5 instead. Arguments and initial weights are those of `DCGANEncoder`.
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int, width: int = 64) -> None:
        super().__init__()
        channels, rows, columns = check_image_shape(image_shape)
        count = _halvings(rows, columns)
        smallest = (width * 2 ** (count - 1), rows >> count, columns >> count)
        units = smallest[0] * smallest[1] * smallest[2]
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, units),
            nn.Unflatten(1, smallest),
            _ChannelsLast(),
            nn.BatchNorm2d(smallest[0]),
            nn.ReLU(),
        ]
        before = smallest[0]
        for filters in [width * 2**i for i in reversed(range(count - 1))]:
            up = nn.ConvTranspose2d(before, filters, 4, stride=2, padding=1)
            layers += [up, nn.BatchNorm2d(filters), nn.ReLU()]
            before = filters
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(before, channels, 4, stride=2, padding=1))
        self.apply(_start)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) → x̂ (B, C, H, W) in [0, 1], float32 or better."""
        h = self.layers(z)
        return 0.5 * torch.tanh(h.to(torch.promote_types(h.dtype, torch.float32))) + 0.5


class InfoGANDiscriminator(nn.Module):
    """Discriminator of InfoGAN (arXiv:1606.03657): images → logits. It is `autoencoder.Encoder` with leaky ReLUs.

    Conv(C, w, 4, stride 2)–LeakyReLU(0.2)–Conv(w, 2w, 4, stride 2)–BN–LeakyReLU–Linear(2w·H/4·W/4, hidden)–BN–LeakyReLU–
    Linear(hidden, 1). Images are scaled to [−1, 1] first. Initial weights are those of `DCGANEncoder`.

    Args:
        image_shape: (C, H, W), H and W multiples of 4.
        width: w, channels after the first convolution.    hidden: units of the dense layer.
        norm: see `DCGANEncoder`.
    """

    def __init__(self, image_shape: Sequence[int], width: int, hidden: int, norm: Norm = "batch") -> None:
        super().__init__()
        channels, rows, columns = check_image_shape(image_shape)
        self.features = nn.Sequential(
            _ChannelsLast(),
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(_SLOPE),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            _norm2d(2 * width, norm),
            nn.LeakyReLU(_SLOPE),
            nn.Flatten(),
            nn.Linear(2 * width * (rows // 4) * (columns // 4), hidden),
            nn.BatchNorm1d(hidden) if norm == "batch" else nn.LayerNorm(hidden),
            nn.LeakyReLU(_SLOPE),
        )
        self.head = nn.Linear(hidden, 1)
        self.apply(_start)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, 1), float32 or better also under autocast."""
        return _headed(self.head, self.features(2 * x - 1))


class CodeDiscriminator(nn.Module):
    """MLP of codes with leaky ReLUs: codes z (B, D) → logits (B, 1), float32 or better.

    It has no batch norm, because alpha-GAN fails with one here (victor-shepardson/alpha-GAN). Weights start as torch's do.

    Args:
        dim: D of the codes.    hidden: widths of the hidden layers; three layers of 750 in arXiv:1706.04987.
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (750, 750, 750)) -> None:
        super().__init__()
        widths = (dim, *hidden)
        pairs = zip(widths, hidden, strict=False)
        self.layers = nn.Sequential(*(part for a, b in pairs for part in (nn.Linear(a, b), nn.LeakyReLU(_SLOPE))))
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, D) → (B, 1)."""
        return _headed(self.head, self.layers(z))


class _ChannelsLast(nn.Module):
    """Images (B, C, H, W), the channels of a pixel next to each other."""

    def forward(self, x: Tensor) -> Tensor:
        """The same images."""
        if x.shape[1] == 1:
            return x.as_strided(x.shape, (x.stride(0), 1, x.stride(2), x.stride(3)))
        return x.contiguous(memory_format=torch.channels_last)


def _halvings(rows: int, columns: int) -> int:
    """How often an image of this size, multiples of 4, is halved; at least once."""
    count = 1
    while all(size % 2 ** (count + 1) == 0 and size >> (count + 1) >= _LEAST for size in (rows, columns)):
        count += 1
    return count


def _norm2d(channels: int, norm: Norm) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(1, channels)


def _headed(head: nn.Linear, h: Tensor) -> Tensor:
    """The head's outputs, outside of autocast: codes and logits of bfloat16 have 8 bits."""
    with torch.autocast(h.device.type, enabled=False):
        return head(h.to(head.weight.dtype))


def _start(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(layer.weight, std=0.02)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
