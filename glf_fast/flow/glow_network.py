"""The network of Glow's couplings: convolutions 3 × 3, 1 × 1 and 3 × 3, the last of them zero at the start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.actnorm import ActNorm

__all__ = ["GlowNetwork"]


class GlowNetwork(nn.Module):
    """(B, channels_in, H, W) → (B, channels_out, H, W): Glow (arXiv:1807.03039), released code.

    h₁ = relu(actnorm(conv 3 × 3 of [x, 1])), h₂ = relu(actnorm(conv 1 × 1 of h₁)), output = e^(factor·g)·conv 3 × 3 of [h₂, 1]

    The channel of ones beside x and h₂ lets the convolutions see the border of the image, which is padded with zeros in all
    channels: Glow's indicator of the padding, up to the sign of its weights. Weights start as N(0, 0.05²), those of the last
    convolution and its log-gains g as zeros. The ActNorms start from the first batch in training mode; from then on they are
    folded into the weights of the convolutions before them.

    Args:
        channels_in, channels_out: channels of input and output.
        width: channels of h₁ and h₂.
        gain_factor: factor of g, which makes the gains learn so many times as fast; 3 in Glow's code, 0 for no gains.
    """

    def __init__(self, channels_in: int, channels_out: int, width: int, *, gain_factor: float = 3.0) -> None:
        super().__init__()
        self.gain_factor = gain_factor
        self.first = nn.Conv2d(channels_in + 1, width, 3, padding=1, bias=False)
        self.first_norm = ActNorm(width)
        self.second = nn.Conv2d(width, width, 1, bias=False)
        self.second_norm = ActNorm(width)
        self.last = nn.Conv2d(width, channels_out, 3, padding=1)
        self.edge = nn.Parameter(torch.zeros(channels_out, 3, 3))  # weights of the channel of ones beside h₂
        self.log_gain = nn.Parameter(torch.zeros(channels_out)) if gain_factor else None
        nn.init.normal_(self.first.weight, std=0.05)
        nn.init.normal_(self.second.weight, std=0.05)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Raw log-scales and shifts."""
        x = torch.cat([x, x.new_ones(len(x), 1, *x.shape[2:])], 1)
        last, bias = self.last.weight, self.last.bias
        assert bias is not None
        offset = _convolved_ones(self.edge, *x.shape[2:]) + bias.view(-1, 1, 1)
        if self.log_gain is not None:
            gain = torch.exp(self.gain_factor * self.log_gain).view(-1, 1, 1)
            last, offset = last * gain.unsqueeze(-1), offset * gain
        if self.first_norm.starts_next() or self.second_norm.starts_next():
            h = self.first_norm(self.first(x))[0].relu()
            h = self.second_norm(self.second(h))[0].relu()
            return F.conv2d(h, last, padding=1) + offset
        return ops.glow_network(
            x, *_folded(self.first, self.first_norm), *_folded(self.second, self.second_norm), last, offset
        )

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"gain_factor={self.gain_factor:g}"


def _convolved_ones(weight: Tensor, height: int, width: int) -> Tensor:
    """The convolution (O, height, width) of a channel of ones, padded with zeros, by weights (O, 3, 3)."""
    inside = [F.pad(weight.new_ones(side), (1, 1)).unfold(0, 3, 1) for side in (height, width)]  # (side, 3)
    with torch.autocast(weight.device.type, enabled=False):
        return inside[0] @ weight @ inside[1].mT


def _folded(convolution: nn.Conv2d, norm: ActNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of norm(convolution(x)) = (W x + b)·e^s = (e^s W) x + b·e^s."""
    scale = torch.exp(norm.log_scale)
    return convolution.weight * scale.view(-1, 1, 1, 1), norm.bias * scale
