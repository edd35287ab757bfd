"""Reconstruction losses of images in [0, 1]: summed over everything in an image, averaged over the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from glf_fast.models.perceptual import perceptual

__all__ = ["check_reconstruction", "reconstruction_loss"]


def _mse(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat - x).square().sum()


def _bce(x_hat: Tensor, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # refused under autocast, though its arguments are float32 here
        return F.binary_cross_entropy(x_hat, x, reduction="sum")


def _l1(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat - x).abs().sum()


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": _mse,
    "bce": _bce,
    "l1": _l1,
    "perceptual": perceptual,
}


def reconstruction_loss(name: str, x_hat: Tensor, x: Tensor) -> Tensor:
    """d(x̂, x)/B as a scalar, for images x̂ and x (B, C, H, W) in [0, 1].

    | name         | d, summed over the batch                                                  |
    |--------------|---------------------------------------------------------------------------|
    | `mse`        | Σ (x̂ − x)²                                                                |
    | `bce`        | −Σ x·log x̂ + (1 − x)·log(1 − x̂)                                           |
    | `l1`         | Σ |x̂ − x|                                                                 |
    | `perceptual` | L1 of the pixels and of VGG16's feature maps, see `perceptual.perceptual` |

    Each loss is computed in float32 or better. Raises ValueError for another name.
    """
    check_reconstruction(name)
    return _LOSSES[name](x_hat, x) / len(x)


def check_reconstruction(name: str) -> None:
    """Raise ValueError unless there is a loss of this name."""
    if name not in _LOSSES:
        raise ValueError(f"reconstruction must be one of {', '.join(map(repr, _LOSSES))}; got {name!r}")
