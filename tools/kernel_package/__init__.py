"""Couplings of normalizing flows in one Triton launch each way: affine ones with any log-scale, rational-quadratic splines.

Functions of tensors, with first derivatives. The kernels and the formulas are those of glf_fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.affine_coupling import coupling_backward, coupling_forward
from .kernels.spline import splines_backward, splines_forward
from .reference import LOG_SCALES, Spline
from .reference.log_scale import prepared_constant

__all__ = ["LOG_SCALES", "Spline", "affine_coupling", "spline"]


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
        v, u, t: transformed half, raw log-scale, shift; one shape (B, …), any strides, on a GPU.
        log_scale: name of f, a key of LOG_SCALES; `log_scale_constant` replaces its default constant.
        inverse: undo it: v = (w − t)·e^−f(u), with `v` the given w.

    Returns:
        w like v, and logdet (B,) of the direction applied; both float32 or better.

    Raises:
        ValueError: shapes differ, or an unknown `log_scale`. TypeError: not floating-point.

    Source: RealNVP (arXiv:1605.08803), eq. 4; Glow (arXiv:1807.03039), table 1.
    """
    if log_scale not in LOG_SCALES:
        raise ValueError(f"log_scale must be one of {', '.join(LOG_SCALES)}; got {log_scale!r}")
    for name, tensor in (("v", v), ("u", u), ("t", t)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point; got {tensor.dtype}")
        if tensor.shape != v.shape or tensor.ndim < 2:
            raise ValueError(
                f"v, u and t must have one shape (B, …); {name} has {tuple(tensor.shape)}, v {tuple(v.shape)}"
            )
    constant = prepared_constant(log_scale, log_scale_constant)
    return _AffineCoupling.apply(v, u, t, (log_scale, constant, add_first, inverse))


def spline(x: Tensor, parameters: Tensor, options: Spline, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Monotonic rational-quadratic splines of single numbers, and the log-determinant of each row.

    Args:
        x: (rows, columns), float32 or float64, on a GPU.
        parameters: (rows, columns, options.columns), as a network makes them: widths, heights, slopes.
        options: bins, box, tails and parametrization, see `Spline`.
        inverse: x(y) in place of y(x).

    Returns:
        y like x, and logdet (rows,), the sums of the log-derivatives.

    Raises:
        ValueError: shapes that do not fit. TypeError: dtypes that the kernel does not take.

    Source: Durkan et al., Neural Spline Flows (arXiv:1906.04032), eqs. 4 to 8.
    """
    if x.dtype not in (torch.float32, torch.float64) or parameters.dtype != x.dtype:
        raise TypeError(f"x and parameters must both be float32 or float64; got {x.dtype} and {parameters.dtype}")
    if x.ndim != 2 or parameters.shape != (*x.shape, options.columns):
        raise ValueError(
            f"x must be (rows, columns), and parameters (rows, columns, {options.columns}); "
            f"got {tuple(x.shape)} and {tuple(parameters.shape)}"
        )
    return _Spline.apply(x.contiguous(), parameters.contiguous(), options.prepared().numbers(), inverse)


class _AffineCoupling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, u: Tensor, t: Tensor, formula: tuple[str, float, bool, bool]
    ) -> tuple[Tensor, Tensor]:
        ctx.formula = formula
        ctx.save_for_backward(v, u, t)
        return coupling_forward(v, u, t, *formula)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return *coupling_backward(*grads, *ctx.saved_tensors, *ctx.formula), None


class _Spline(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, numbers: list[float], inverse: bool) -> tuple[Tensor, Tensor]:
        ctx.options = numbers, inverse
        ctx.save_for_backward(x, parameters)
        return splines_forward(x, parameters, numbers, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return *splines_backward(*(grad.contiguous() for grad in grads), *ctx.saved_tensors, *ctx.options), None, None
