"""The network of Glow's couplings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["glow_network"]


def glow_network(
    x: Tensor,
    first: Tensor,
    first_log_scale: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_log_scale: Tensor,
    second_bias: Tensor,
    last: Tensor,
    edge: Tensor,
    bias: Tensor,
    log_gain: Tensor,
    gain_factor: float,
) -> Tensor:
    """e^(γg)·(conv 3 × 3 of [h₂, 1] + bias), the network of a coupling in Glow (arXiv:1807.03039):

        h₁ = relu((conv 3 × 3 of [x, 1] + b₁)·e^s₁),  h₂ = relu((conv 1 × 1 of h₁ + b₂)·e^s₂).

    `x` (B, C, H, W); `first` (N, C + 1, 3, 3), `second` (N, N, 1, 1), `last` (O, N, 3, 3); b and s (N,); `edge` (O, 3, 3): the
    weights of the channel of ones beside h₂; `bias` and `log_gain` g (O,); γ is `gain_factor`. Images are padded with zeros, so
    that the channels of ones show where the image ends. Returns (B, O, H, W).

    ActNorms and gains are folded into the weights before them: (W x + b)·e^s = (e^s W) x + b·e^s.
    """
    ones = x.new_ones(len(x), 1, *x.shape[2:])
    scales = [torch.exp(s).view(-1, 1, 1, 1) for s in (first_log_scale, second_log_scale, gain_factor * log_gain)]
    h = F.conv2d(torch.cat([x, ones], 1), first * scales[0], first_bias * scales[0].flatten(), padding=1).relu()
    h = F.conv2d(h, second * scales[1], second_bias * scales[1].flatten()).relu()
    # The convolution of the ones, one map for all images: each side has a row of taps that are inside for each pixel.
    inside = [F.pad(edge.new_ones(side), (1, 1)).unfold(0, 3, 1) for side in x.shape[2:]]
    with torch.autocast(x.device.type, enabled=False):
        offset = (inside[0] @ edge @ inside[1].mT + bias.view(-1, 1, 1)) * scales[2].view(-1, 1, 1)
    return F.conv2d(h, last * scales[2], padding=1) + offset
