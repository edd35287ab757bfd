"""The affine coupling of images with Glow's network as one operation."""

from __future__ import annotations

from torch import Tensor

from glf_fast.ops.affine_coupling import affine_coupling
from glf_fast.ops.affine_coupling.call import AffineOptions
from glf_fast.ops.backends import kernels_for
from glf_fast.ops.checks import check_alike, check_floating, check_log_scale, check_shape
from glf_fast.ops.glow_coupling import cpp
from glf_fast.ops.glow_coupling.autograd import run
from glf_fast.ops.glow_coupling.call import GlowOptions, in_steps, with_tensors
from glf_fast.ops.glow_network import glow_network
from glf_fast.ops.glow_network.call import Call as NetworkCall
from glf_fast.ops.glow_network.call import check

__all__ = ["glow_coupling"]


def glow_coupling(
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
    *,
    v_first: bool = False,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """z_v = v·e^f(u) + t, z_p = p of images in two parts (p, v), with (u, t) = `glow_network`(p); or its inverse.

    On a processor an image and all that is computed of it stay in the cache, and what the network made is kept for the
    backward. Elsewhere it is `glow_network` and `affine_coupling`, one after the other.

    Args:
        x: (B, P + T, H, W), in any order of memory; v is the last T channels, or the first ones with `v_first`.
        first, first_log_scale, first_bias, second, second_log_scale, second_bias, last, edge, bias, log_gain: those of the
            network, see `glow_network`, from P channels to 2·T.
        gain_factor: the network's.
        log_scale, log_scale_constant, add_first, inverse: see `affine_coupling`.

    Returns:
        y like x and in its order of memory, and logdet (B,) of the direction applied.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown `log_scale`. TypeError: not floating-point.

    Source: Glow (arXiv:1807.03039), table 1 and released code.
    """
    check_log_scale(log_scale, log_scale_constant)
    for name, tensor in (("x", x), ("last", last)):
        check_floating(name, tensor)
    check_shape("x", x, (None, None, None, None), "(batch, channels, height, width)")
    check_shape("last", last, (None, None, 3, 3), "(2·T, N, 3, 3)")
    tensors = (x, first, first_log_scale, first_bias, second, second_log_scale, second_bias, last, edge, bias, log_gain)
    options = GlowOptions(gain_factor, v_first, AffineOptions(log_scale, log_scale_constant, add_first, inverse))
    call = with_tensors(options, tensors)
    given = x.shape[1] - call.transformed
    check(call.network(x), given)
    if last.shape[0] % 2 or given < 1:
        raise ValueError(
            f"the network's outputs must be 2·T for T of the {x.shape[1]} channels of x, and one must be left to be given; "
            f"got {last.shape[0]}"
        )
    if kernels := kernels_for(x, call, cpp):
        check_alike(list(zip(NetworkCall._fields[1:], tensors[1:], strict=False)), x)
        return run(kernels, call)
    return in_steps(call, glow_network, affine_coupling)
