"""The network of Glow's couplings as one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.backends import kernels_for
from glf_fast.ops.checks import check_alike, check_floating, check_shape
from glf_fast.ops.glow_network import cpp
from glf_fast.ops.glow_network.autograd import run
from glf_fast.ops.glow_network.call import Call

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
    """conv 3 × 3 (relu(conv 1 × 1 (relu(conv 3 × 3 (x))))) + offset of images padded with zeros.

    On a processor an image's hidden layers stay in the cache, and the backward computes them again, so that x alone is kept;
    the matrix products are float32 there also under autocast.

    Args:
        x: (B, C, H, W), in any order of memory.
        first: (N, C, 3, 3). second: (N, N, 1, 1). last: (O, N, 3, 3). first_bias, second_bias: (N,).
        offset: (O, H, W), added to every image.

    Returns:
        (B, O, H, W).

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: not floating-point.

    Source: Glow (arXiv:1807.03039), released code, `f` of model.py.
    """
    call = Call(x, first, first_bias, second, second_bias, last, offset)
    for name, tensor in call._asdict().items():
        check_floating(name, tensor)
    check_shape("x", x, (None, None, None, None), "(batch, channels, height, width)")
    hidden, outputs = first.shape[0], last.shape[0]
    check_shape("first", first, (hidden, x.shape[1], 3, 3), "(N, channels, 3, 3)")
    check_shape("second", second, (hidden, hidden, 1, 1), "(N, N, 1, 1)")
    check_shape("last", last, (outputs, hidden, 3, 3), "(outputs, N, 3, 3)")
    check_shape("offset", offset, (outputs, *x.shape[2:]), "(outputs, height, width)")
    for name, bias in (("first_bias", first_bias), ("second_bias", second_bias)):
        check_shape(name, bias, (hidden,), "(N,)")
    if kernels := kernels_for(x, call, cpp):
        check_alike(list(call._asdict().items())[1:], x)
        with torch.autocast(x.device.type, enabled=False):
            return run(kernels, call)
    return reference.glow_network(*call)
