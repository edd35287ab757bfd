"""Rational-quadratic splines of single numbers, for couplings and autoregressive flows with any conditioner."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.backends import kernels_for
from glf_fast.ops.checks import check_alike, check_floating, check_spline
from glf_fast.ops.spline import cpp, triton
from glf_fast.ops.spline.autograd import plain, run
from glf_fast.ops.spline.call import Call
from glf_fast.reference import Spline

__all__ = ["spline"]

KERNELS = (triton, cpp)  # in the order of preference


def spline(
    x: Tensor, parameters: Tensor, options: Spline, *, inverse: bool = False, event_dims: int = 0
) -> tuple[Tensor, Tensor]:
    """Monotonic rational-quadratic splines, elementwise: y(x) and log y'(x), or with `inverse` x(y) and log x'(y).

    One pass over x and the parameters: softmax, running sums, search, spline, log-derivative and its sum. The backward
    computes them again, so that nothing is kept but the arguments.

    Args:
        x: of any shape.
        parameters: x's shape and n more numbers behind it, as a network makes them: K of widths, K of heights, then those of
            slopes. Shapes that broadcast to it are expanded.
        options: bins, box, tails and parametrization, see `Spline` and `glf_fast.reference.spline` for their formulas.
        event_dims: how many of x's last dimensions the log-derivatives are summed over.

    Returns:
        y like x, and the log-derivatives, of x's shape less its last `event_dims` dimensions; both float32 or better.

    Raises:
        ValueError: shapes or options that do not fit. TypeError: not floating-point, or of different dtypes.

    Source: Durkan et al., Neural Spline Flows (arXiv:1906.04032), eqs. 4 to 8.
    """
    check_spline(options)
    check_floating("x", x)
    check_floating("parameters", parameters)
    wanted = (*x.shape, options.columns)
    try:
        parameters = parameters.expand(wanted)
    except RuntimeError:
        raise ValueError(
            f"parameters must have x's shape and {options.columns} numbers behind it for {options.bins} bins with "
            f"{options.tails} tails, {wanted}; got {tuple(parameters.shape)}"
        ) from None
    if not 0 <= event_dims <= x.ndim:
        raise ValueError(f"event_dims must be between 0 and x's {x.ndim} dimensions; got {event_dims}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    check_alike([("parameters", parameters)], x if x.dtype == dtype else x.new_empty(0, dtype=dtype))
    batch = x.shape[: x.ndim - event_dims]
    rows, columns = batch.numel(), x.shape[x.ndim - event_dims :].numel()
    call = Call(
        x.to(dtype).reshape(rows, columns).contiguous(),
        parameters.to(dtype).reshape(rows, columns, options.columns).contiguous(),
        options,
        inverse,
    )
    kernels = kernels_for(call.x, call, *KERNELS)
    y, logdet = run(kernels, call) if kernels else plain(call)
    return y.view(x.shape), logdet.view(batch)
