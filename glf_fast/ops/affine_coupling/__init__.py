"""The elementwise affine coupling, for couplings with any conditioner."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.affine_coupling import cpp, triton
from glf_fast.ops.affine_coupling.autograd import run
from glf_fast.ops.affine_coupling.call import AffineOptions, Call
from glf_fast.ops.backends import kernels_for
from glf_fast.ops.checks import check_alike, check_floating, check_log_scale

__all__ = ["affine_coupling"]

KERNELS = (triton, cpp)  # in the order of preference


def affine_coupling(
    v: Tensor,
    u: Tensor,
    t: Tensor,
    *,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """w = v·e^f(u) + t (or `add_first`: (v + t)·e^f(u)), or its inverse, and the log-determinant.

    Args:
        v, u, t: transformed half, raw log-scale, shift; one shape (B, …), any strides.
        log_scale: name of f, see `glf_fast.reference.log_scale`; `log_scale_constant` replaces its default constant.
        inverse: undo it: v = (w − t)·e^−f(u), with `v` the given w.

    Returns:
        w like v, and logdet (B,) of the direction applied; both float32 or better.

    Raises:
        ValueError: shapes differ, or an unknown `log_scale`. TypeError: not floating-point.

    Source: RealNVP (arXiv:1605.08803), eq. 4; Glow (arXiv:1807.03039), table 1.
    """
    check_log_scale(log_scale, log_scale_constant)
    for name, tensor in (("v", v), ("u", u), ("t", t)):
        check_floating(name, tensor)
        if tensor.shape != v.shape or tensor.ndim < 2:
            raise ValueError(
                "v, u and t must have one shape (B, …) of two or more dimensions; "
                f"got v {tuple(v.shape)}, u {tuple(u.shape)}, t {tuple(t.shape)}"
            )
    check_alike((("u", u), ("t", t)), v if v.dtype.itemsize >= 4 else v.new_empty(0, dtype=torch.float32))
    options = AffineOptions(log_scale, log_scale_constant, add_first, inverse)
    call = Call(v, u, t, options)
    if kernels := kernels_for(v, call, *KERNELS):
        return run(kernels, call)
    return reference.affine_coupling(v, u, t, **options.keywords())
