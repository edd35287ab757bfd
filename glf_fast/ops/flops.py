"""Floating-point operations of the kernels, for `torch.utils.flop_counter.FlopCounterMode`.

Counted are the matrix products, two for each multiply-add, as PyTorch counts its own operations: in the backward twice those
of the forward, without what is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from glf_fast.ops.backends import CPP

__all__: list[str] = []

Shape = Sequence[int]
operations = torch.ops.glf_fast


def _products(rows: int, matrix: Shape, weights: Sequence[Shape]) -> int:
    """Operations of rows times all matrices of a flow."""
    return 2 * rows * sum(map(math.prod, (matrix, *weights)))


@register_flop_formula(operations.triton_coupling_flow)
def _(
    x: Shape, matrix: Shape, offset: Shape, logabsdet: Shape | None, weights: Sequence[Shape], *_: Any, **__: Any
) -> int:
    return _products(x[0], matrix, weights)


@register_flop_formula(operations.triton_coupling_flow_backward)
def _(
    grad: Shape, grad_logdet: Shape, state: Shape, matrix: Shape, unmatrix: Shape | None, offset: Shape,
    weights: Sequence[Shape], *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * _products(grad_logdet[0], matrix, weights)


@register_flop_formula(operations.triton_autoregressive_flow)
def _(x: Shape, matrix: Shape, offset: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return _products(x[0], matrix, weights)


@register_flop_formula(operations.triton_autoregressive_flow_backward)
def _(
    grad: Shape, grad_logdet: Shape, saved: Shape, matrix: Shape, offset: Shape, weights: Sequence[Shape], *_: Any, **__: Any
) -> int:  # fmt: skip
    return 2 * _products(grad_logdet[0], matrix, weights)


if not CPP.missing:

    @register_flop_formula(operations.cpu_autoregressive_flow)
    def _(x: Shape, matrix: Shape, offset: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
        return _products(x[0], matrix, weights)

    @register_flop_formula(operations.cpu_coupling_flow)
    def _(
        x: Shape, matrix: Shape, offset: Shape, weights: Sequence[Shape], biases: Sequence[Shape], context: Shape | None,
        coupling: int, network: int, activation: int, activation_constant: float,
        log_scale: int, constant: float, add_first: bool, spline: Any,
        inverse: bool, density: bool, save: int, record: int, members: int = 1, *_: Any, **__: Any,
    ) -> int:  # fmt: skip
        return _products(x[0], matrix, weights) // members

    @register_flop_formula(operations.cpu_coupling_flow_backward)
    def _(
        grad: Shape | None, grad_logdet: Shape, out: Shape, saved: Shape, matrix: Shape, unmatrix: Shape | None,
        offset: Shape, weights: Sequence[Shape], biases: Sequence[Shape], context: Shape | None, coupling: int, network: int,
        activation: int, activation_constant: float,
        log_scale: int, constant: float, add_first: bool, spline: Any, inverse: bool, save: int,
        parameters: bool, members: int = 1, *_: Any, **__: Any,
    ) -> int:  # fmt: skip
        return 2 * _products(grad_logdet[0], matrix, weights) // members

    @register_flop_formula(operations.cpu_autoregressive_flow_backward)
    def _(
        grad: Shape | None, grad_logdet: Shape, out: Shape, saved: Shape, matrix: Shape, offset: Shape,
        weights: Sequence[Shape], *_: Any, **__: Any,
    ) -> int:  # fmt: skip
        return 2 * _products(grad_logdet[0], matrix, weights)


@register_flop_formula(operations.plu_assemble)
def _(permutation: Shape, lower: Shape, *_: Any, **__: Any) -> int:
    return _products(lower[-1], lower, ())


@register_flop_formula(operations.plu_assemble_backward)
def _(permutation: Shape, lower: Shape, *_: Any, **__: Any) -> int:
    return 2 * _products(lower[-1], lower, ())
