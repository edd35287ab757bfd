"""Wasserstein autoencoder whose codes are drawn to the prior by the maximum mean discrepancy: WAE-MMD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from glf_fast.models.latent import ExPostModel, ExPostSettings
from glf_fast.models.model import Words
from glf_fast.models.reconstruction import reconstruction_loss
from glf_fast.models.whole_batch import whole
from glf_fast.settings import NOT_NEGATIVE, Rule

__all__ = ["WAE", "WAESettings", "squared_mmd"]

# The paper has one kernel, with s = 1; the released code adds up kernels with these s.
_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class WAESettings(ExPostSettings):
    """Wasserstein autoencoder with the maximum mean discrepancy (MMD)."""

    name: str = "wae-mmd"
    """Name of the model."""
    reconstruction: Literal["mse", "bce", "l1", "perceptual"] = "mse"
    """Distance between images and their reconstructions."""
    mmd_weight: float = 200.0
    """Weight of the squared MMD between codes and N(0, I), against the reconstruction loss of an image."""

    RULES: ClassVar[Mapping[str, Rule]] = {**ExPostSettings.RULES, "mmd_weight": NOT_NEGATIVE}

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions, {self.reconstruction} loss, λ = {self.mmd_weight:g}"


class WAE(ExPostModel):
    """WAE-MMD (Tolstikhin, Bousquet, Gelly, Schölkopf, arXiv:1711.01558, algorithm 2), with a deterministic encoder E.

    With decoder D the loss of a batch is

        mean d(D(E(x)), x) + λ·MMD²(E(x), e),        e ~ N(0, I), as many as there are images,

    see `squared_mmd`. The default λ is that of the released code for MNIST: 10, with 0.05·‖D(E(x)) − x‖² for d.

    The estimate of MMD² is unbiased for independent codes, but batch norm makes the codes of a batch dependent. After two
    epochs on Fashion-MNIST it was −0.007 in training, and 0.005 in eval mode, both on test images.

    Args:
        shape: (C, H, W) of the images, H and W multiples of 4.
        settings: see `WAESettings`; `mmd_weight` is λ, `reconstruction` is d.
    """

    Settings = WAESettings
    words = Words(
        "WAE-MMD",
        curves={"reconstruction": "reconstruction", "mmd": "squared MMD between codes and N(0, I)"},
        about_curves="The squared MMD is estimated, so it can be negative.",
    )
    settings: WAESettings

    def __init__(self, shape: Sequence[int], settings: WAESettings = WAESettings()) -> None:
        super().__init__(shape, settings)

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch x (B, C, H, W) in [0, 1], B ≥ 2: the loss and its two terms; `generator` is the source of e."""
        z = self.encode(x)
        codes = whole(z)
        noise = torch.randn(codes.shape, generator=generator, device=z.device, dtype=z.dtype)
        error = reconstruction_loss(self.settings.reconstruction, self.decode(z), x)
        mmd = squared_mmd(codes, noise)
        return {"loss": error + self.settings.mmd_weight * mmd, "reconstruction": error, "mmd": mmd}


def squared_mmd(z: Tensor, e: Tensor) -> Tensor:
    """The unbiased estimate of MMD² between the laws of the rows z (n, d) and e (m, d), e from N(0, I): a scalar.

        Σ_{i≠j} k(z_i, z_j) / n(n−1) + Σ_{i≠j} k(e_i, e_j) / m(m−1) − 2·Σ_{i,j} k(z_i, e_j) / nm

    with the inverse multiquadratic kernel k(x, y) = Σ_s C_s / (C_s + ‖x − y‖²), C_s = 2·d·s, and the released code's scales
    s = 0.1, 0.2, 0.5, 1, 2, 5, 10. The paper has s = 1 alone. 2·d is the mean of ‖x − y‖² for x and y from N(0, I).
    """
    return _mean_of_pairs(_kernel(z, z)) + _mean_of_pairs(_kernel(e, e)) - 2 * _kernel(z, e).mean()


def _mean_of_pairs(kernel: Tensor) -> Tensor:
    """Mean of a matrix (n, n) without its diagonal."""
    return (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """k of each row of x (n, d) with each row of y (m, d): (n, m)."""
    with torch.autocast(x.device.type, enabled=False):  # in bfloat16 the differences of squares would be lost
        squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT
    squares = squares.clamp(min=0)
    return torch.stack([1 / (1 + squares / (2 * x.shape[1] * scale)) for scale in _SCALES]).sum(0)
