"""The network of Glow's couplings as one operation."""

from __future__ import annotations

from torch import Tensor

from glf_fast import reference
from glf_fast.ops.backends import kernels_for
from glf_fast.ops.checks import check_alike
from glf_fast.ops.glow_network import cpp
from glf_fast.ops.glow_network.autograd import run
from glf_fast.ops.glow_network.call import Call, check

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
    """e^(γg)·(conv 3 × 3 of [h₂, 1] + bias), the network of a coupling in Glow, whose ActNorms have scales e^s and biases b.

        h₁ = relu((conv 3 × 3 of [x, 1] + b₁)·e^s₁),  h₂ = relu((conv 1 × 1 of h₁ + b₂)·e^s₂)

    On a processor an image's hidden layers stay in the cache, and the backward computes them again, so that x alone is kept;
    the matrix products are float32 there also under autocast.

    Args:
        x: (B, C, H, W), in any order of memory; padded with zeros.
        first: (N, C + 1, 3, 3), whose last channel is that of ones. second: (N, N, 1, 1). last: (O, N, 3, 3).
        first_log_scale, second_log_scale: s (N,). first_bias, second_bias: b (N,), of the ActNorms behind.
        edge: (O, 3, 3), weights of the channel of ones beside h₂.
        bias, log_gain: (O,), the last one g. gain_factor: γ.

    Returns:
        (B, O, H, W).

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: not floating-point.

    Source: Glow (arXiv:1807.03039), released code, `f` of model.py.
    """
    tensors = (x, first, first_log_scale, first_bias, second, second_log_scale, second_bias, last, edge, bias, log_gain)
    call = Call.of(tensors, gain_factor)
    check(call, x.shape[1] if isinstance(x, Tensor) and x.ndim == 4 else 0)
    if kernels := kernels_for(x, call, cpp):
        check_alike(list(zip(Call._fields[1:], tensors[1:], strict=False)), x)
        return run(kernels, call)
    return reference.glow_network(*call)
