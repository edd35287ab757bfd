"""1 − MS-SSIM: how different samples are from each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from glf_fast.images import to_float
from glf_fast.metrics.estimates import Estimate, TooFew

__all__ = ["PAIRS", "diversity", "ms_ssim", "scales"]

# Weights of the scales from the finest to the coarsest (Wang, Simoncelli, Bovik, 2003, section 3.2).
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
PAIRS = 2000
_CHUNK = 250


def scales(height: int, width: int) -> int:
    """Number of scales for images of this size: as many of the five as are at least as large as the window of 11 pixels.

    These are 2 for 28 and 32 pixels, 3 for 64, and 5 from 176 pixels.
    """
    side = min(height, width)
    return max(1, sum(side >> scale >= WINDOW for scale in range(len(WEIGHTS))))


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale structural similarity (N,) of image pairs (N, C, H, W) in [0, 1]; 1 for equal images.

    Π_j cs_jʷʲ · lʷᴹ over M = `scales` scales (Wang, Simoncelli & Bovik, "Multi-scale structural similarity for image quality
    assessment", 2003, equation 7), the mean over channels; a Gaussian window of 11 pixels with σ = 1.5, images halved by the
    mean of 2 × 2 pixels. Small images have fewer scales, whose weights are divided by their sum. Of images below 11 pixels the
    window is as large as the image, with σ in proportion. Negative similarities count as 0.
    """
    count = scales(*a.shape[2:])
    weights = a.new_tensor(WEIGHTS[:count]) / sum(WEIGHTS[:count])
    product = torch.ones(a.shape[:2], dtype=a.dtype, device=a.device)
    for scale in range(count):
        luminance, contrast = _ssim(a, b)
        last = scale == count - 1
        product = product * (luminance * contrast if last else contrast).mean((2, 3)).clamp(min=0) ** weights[scale]
        if not last:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product.mean(1)


def _ssim(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of luminance similarity and of contrast-structure similarity."""

    def blurred(x: Tensor) -> Tensor:
        for dim in (2, 3):
            size = min(WINDOW, x.shape[dim])
            offsets = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2
            window = (-offsets.square() / (2 * (SIGMA * size / WINDOW) ** 2)).exp()
            kernel = (window / window.sum()).view(1, 1, *((-1, 1) if dim == 2 else (1, -1)))
            x = F.conv2d(x, kernel.expand(x.shape[1], -1, -1, -1), groups=x.shape[1])
        return x

    mean_a, mean_b = blurred(a), blurred(b)
    variances = blurred(a * a) - mean_a.square() + blurred(b * b) - mean_b.square()
    covariance = blurred(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    return luminance, (2 * covariance + C2) / (variances + C2)


def diversity(images: Tensor, pairs: int = PAIRS) -> Estimate:
    """1 − MS-SSIM, the mean over pairs of uint8 images (N, C, H, W) that follow each other, each used once; in [0, 1].

    Higher means more different images. Noise is very different, too, so the value has a meaning only beside that of real
    images, and for images of one kind (Odena et al., arXiv:1610.09585, section 4.2; Rosca et al., arXiv:1706.04987, section 5).

    Raises:
        TooFew: fewer than two images.
    """
    pairs = min(pairs, len(images) // 2)
    if pairs < 1:
        raise TooFew(f"1 − MS-SSIM needs at least two images, got {len(images)}")
    values = torch.cat(
        [1 - ms_ssim(to_float(part[0::2]).double(), to_float(part[1::2]).double())
         for part in images[: 2 * pairs].split(2 * _CHUNK)]
    )  # fmt: skip
    value = float(values.mean())
    if pairs < 20:
        return Estimate(value, None)
    error = 1.96 * float(values.std()) / pairs**0.5
    return Estimate(value, (max(0.0, value - error), min(1.0, value + error)))
