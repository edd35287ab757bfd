"""The network of Glow's couplings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["glow_network"]


def glow_network(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    last: Tensor,
    offset: Tensor,
) -> Tensor:
    """conv 3 × 3 (relu(conv 1 × 1 (relu(conv 3 × 3 (x))))) of images padded with zeros; Glow (arXiv:1807.03039), released code.

    `x` (B, C, H, W); `first` (N, C, 3, 3), `second` (N, N, 1, 1), `last` (O, N, 3, 3); the biases (N,); `offset` (O, H, W) is
    added to every image. Returns (B, O, H, W).
    """
    h = F.conv2d(x, first, first_bias, padding=1).relu_()
    h = F.conv2d(h, second, second_bias).relu_()
    return F.conv2d(h, last, padding=1) + offset
