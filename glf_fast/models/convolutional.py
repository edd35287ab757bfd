"""Encoder and decoder with the networks of RAE, which several autoencoders share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glf_fast.models.autoencoder import check_image_shape

__all__ = ["ConvolutionalDecoder", "ConvolutionalEncoder"]

# From this size on, kernels are 5 × 5 and the decoder doubles images three times; below, they are 4 × 4 and it doubles twice.
_LARGE = 64


class ConvolutionalEncoder(nn.Module):
    """Encoder of RAE (arXiv:1903.12436) as in its released code: images (B, C, H, W) in [0, 1] → codes.

    Four blocks Conv(stride 2)–BN–ReLU with w, 2w, 4w and 8w channels, then Linear(8w·⌈H/16⌉·⌈W/16⌉, latent); the images are
    scaled to [−1, 1] first, as the released code does for MNIST and CIFAR-10, but not for CelebA. Kernels are 4 × 4, and 5 × 5
    for images of 64 pixels or more. Padding is TensorFlow's "same".
    Weights start as Keras's do, uniform by Glorot's rule, and biases as 0.

    Args:
        image_shape: (C, H, W), H and W multiples of 4, and of 8 from 64 pixels on.
        latent_dim: D of the codes.
        width: w, channels after the first convolution; 128 in the paper.
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int, width: int = 128) -> None:
        super().__init__()
        (channels, rows, columns), kernel, _ = _geometry(image_shape)
        layers: list[nn.Module] = []
        for filters in (width, 2 * width, 4 * width, 8 * width):
            convolution = nn.Conv2d(channels, filters, kernel, stride=2)
            layers += [_same(rows, columns, kernel, 2), convolution, nn.BatchNorm2d(filters), nn.ReLU()]
            channels, rows, columns = filters, -(-rows // 2), -(-columns // 2)
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * rows * columns, latent_dim)
        self.apply(_start)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → z (B, latent_dim), float32 or better also under autocast."""
        h = self.features(2 * x - 1)
        # A bf16 code has 8 bits, so a density would learn the grid of rounded values.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(h.to(self.head.weight.dtype))


class ConvolutionalDecoder(nn.Module):
    """Decoder: codes (B, latent_dim) → images (B, C, H, W) in [0, 1].

    Linear(latent, 8w·H/4·W/4), ConvT(8w, 4w, stride 2)–BN–ReLU, ConvT(4w, 2w, stride 2)–BN–ReLU, Conv(2w, C), sigmoid. For
    images of 64 pixels or more there is a third block, ConvT(2w, w, stride 2)–BN–ReLU, and Linear gives 8w·H/8·W/8 units. As in
    the released code nothing stands between the first two layers. Its last layer, a transposed convolution of stride 1, is a
    convolution with the mirrored kernel. Arguments and initial weights are those of `ConvolutionalEncoder`.
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int, width: int = 128) -> None:
        super().__init__()
        (channels, rows, columns), kernel, doublings = _geometry(image_shape)
        before = 8 * width
        smallest = (before, rows // 2**doublings, columns // 2**doublings)
        layers: list[nn.Module] = [nn.Linear(latent_dim, before * smallest[1] * smallest[2]), nn.Unflatten(1, smallest)]
        for filters in (4 * width, 2 * width, width)[:doublings]:
            # Kernel 4 with padding 1 doubles exactly; kernel 5 with padding 2 is one short.
            padding = (kernel - 1) // 2
            up = nn.ConvTranspose2d(before, filters, kernel, 2, padding, output_padding=kernel % 2)
            layers += [up, nn.BatchNorm2d(filters), nn.ReLU()]
            before = filters
        self.layers = nn.Sequential(*layers, _same(rows, columns, kernel, 1), nn.Conv2d(before, channels, kernel))
        self.apply(_start)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) → x̂ (B, C, H, W) in [0, 1], float32 or better."""
        h = self.layers(z)
        return h.to(torch.promote_types(h.dtype, torch.float32)).sigmoid()


def _geometry(image_shape: Sequence[int]) -> tuple[tuple[int, int, int], int, int]:
    """(C, H, W), the size of the kernels, and how often the decoder doubles; raises ValueError for other sizes."""
    _, *size = check_image_shape(image_shape)
    kernel, doublings = (5, 3) if min(size) >= _LARGE else (4, 2)
    return check_image_shape(image_shape, 2**doublings), kernel, doublings


def _same(rows: int, columns: int, kernel: int, stride: int) -> nn.ZeroPad2d:
    """The padding before a convolution after which it gives ⌈n/stride⌉ of n pixels; one more below and right if it is odd."""
    lacking = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (columns, rows)]
    left, top = (total // 2 for total in lacking)
    return nn.ZeroPad2d((left, lacking[0] - left, top, lacking[1] - top))


def _start(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
