"""The elementwise affine coupling on a processor (csrc/cpu/affine_coupling.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.affine_coupling.call import AffineOptions, Call
from glf_fast.ops.backends import CPP
from glf_fast.ops.checks import check_fake
from glf_fast.ops.codes import LOG_SCALE_CODES

__all__ = ["BACKENDS", "backward", "forward", "refuses"]

BACKENDS = (CPP,)
operations = torch.ops.glf_fast


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call; "" where they can."""
    return "" if call.options.log_scale in LOG_SCALE_CODES else f"csrc has no log-scale {call.options.log_scale!r}"


def _numbers(options: AffineOptions) -> tuple[int, float, bool, bool]:
    """log_scale, constant, add_first, inverse, as the kernels take them."""
    return LOG_SCALE_CODES[options.log_scale], options.constant, options.add_first, options.inverse


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """w, in v's order of memory, and logdet (B,)."""
    v = call.v
    last = _channels_last(v)
    samples = [_samples(x, last) for x in (v, call.u.to(v.dtype), call.t.to(v.dtype))]
    w, logdet = operations.cpu_affine_coupling.default(*samples, *_numbers(call.options))
    return _image(w, v.shape, last), logdet


def backward(call: Call, grad_w: Tensor, grad_logdet: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∂v, ∂u, ∂t, each in the precision of its operand."""
    v, u, t, options = call
    last = _channels_last(v)
    samples = [_samples(x, last) for x in (v, u.to(v.dtype), t.to(v.dtype))]
    found = operations.cpu_affine_coupling_backward.default(
        _samples(grad_w, last).contiguous(), grad_logdet.contiguous(), *samples, *_numbers(options)
    )
    grad_v, grad_u, grad_t = (_image(grad, v.shape, last) for grad in found)
    return grad_v, grad_u.to(u.dtype), grad_t.to(t.dtype)


def _channels_last(x: Tensor) -> bool:
    return x.ndim > 2 and x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2:].numel() > 1


def _samples(x: Tensor, channels_last: bool) -> Tensor:
    """(B, n), or (B, pixels, channels); only the last dimension is in one piece: halves of a split are not copied."""
    x = x.flatten(2).mT if channels_last else x.flatten(1)
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # an empty x calls itself contiguous, with any strides


def _image(samples: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The inverse of `_samples`: rows as an image again."""
    return (samples.mT if channels_last else samples).view(shape)


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------

if not CPP.missing:

    @torch.library.register_fake("glf_fast::cpu_affine_coupling")
    def _(
        v: Tensor, u: Tensor, t: Tensor, log_scale: int, constant: float, add_first: bool, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        check_fake(v)
        return v.new_empty(v.shape), v.new_empty(v.shape[0])

    @torch.library.register_fake("glf_fast::cpu_affine_coupling_backward")
    def _(
        grad_w: Tensor, grad_logdet: Tensor, v: Tensor, u: Tensor, t: Tensor, log_scale: int, constant: float,
        add_first: bool, inverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return v.new_empty(v.shape), v.new_empty(v.shape), v.new_empty(v.shape)
