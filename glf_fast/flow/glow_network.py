"""The network of Glow's couplings: convolutions 3 × 3, 1 × 1 and 3 × 3, the last of them zero at the start."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.actnorm import ActNorm
from glf_fast.ops.checks import check_integer

__all__ = ["GlowNetwork", "check_gain_factor"]


def check_gain_factor(value: Any) -> None:
    """Raise ValueError unless `value` is a factor of log-gains: 0 or more, and finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"gain_factor must be a number, 0 or more; got {value!r}")


_Ten = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
        for name, value in (("channels_in", channels_in), ("channels_out", channels_out), ("width", width)):
            check_integer(name, value, 1)
        check_gain_factor(gain_factor)
        super().__init__()
        self.gain_factor = gain_factor
        self.first = nn.Conv2d(channels_in + 1, width, 3, padding=1, bias=False)
        self.first_norm = ActNorm(width)
        self.second = nn.Conv2d(width, width, 1, bias=False)
        self.second_norm = ActNorm(width)
        self.last = nn.Parameter(torch.zeros(channels_out, width, 3, 3))
        self.edge = nn.Parameter(torch.zeros(channels_out, 3, 3))  # weights of the channel of ones beside h₂
        self.bias = nn.Parameter(torch.zeros(channels_out))
        gains = torch.zeros(channels_out)
        if gain_factor:
            self.log_gain = nn.Parameter(gains)
        else:
            self.register_buffer("log_gain", gains, persistent=False)
        nn.init.normal_(self.first.weight, std=0.05)
        nn.init.normal_(self.second.weight, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        """Raw log-scales and shifts."""
        self.start(x)
        return ops.glow_network(x, *self.tensors(), self.gain_factor)

    def start(self, x: Tensor) -> None:
        """Start the ActNorms from the network's input, where this batch is their first."""
        one, two = self.first_norm, self.second_norm
        if one.starts_next() or two.starts_next():
            with torch.no_grad():
                h = one(self.first(torch.cat([x, x.new_ones(len(x), 1, *x.shape[2:])], 1)))[0].relu()
                two(self.second(h))

    def tensors(self) -> _Ten:
        """The parameters in the order of `ops.glow_network`."""
        one, two = self.first_norm, self.second_norm
        return (
            self.first.weight, one.log_scale, one.bias, self.second.weight, two.log_scale, two.bias,
            self.last, self.edge, self.bias, self.log_gain,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"gain_factor={self.gain_factor:g}"
