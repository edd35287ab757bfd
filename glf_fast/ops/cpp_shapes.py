"""What the C++ operations return, in shapes alone: torch.compile traces with these. Imported where the library is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []


@torch.library.register_fake("glf_fast::cpu_coupling_flow")
def _(
    x: Tensor, matrix: Tensor, offset: Tensor, weights: list[Tensor], biases: list[Tensor], context: Tensor | None,
    activation: int, log_scale: int, constant: float, add_first: bool, inverse: bool, density: bool,
    save: int, record: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    saved = x.new_empty(0) if save == 0 else x.new_empty(len(matrix), len(x), record)
    return torch.empty_like(x), x.new_empty(len(x)), saved


@torch.library.register_fake("glf_fast::cpu_coupling_flow_backward")
def _(
    grad_out: Tensor | None, grad_logdet: Tensor, out: Tensor, saved: Tensor, matrix: Tensor, unmatrix: Tensor | None,
    offset: Tensor, weights: list[Tensor], biases: list[Tensor], context: Tensor | None,
    activation: int, log_scale: int, constant: float, add_first: bool, inverse: bool, save: int, parameters: bool,
) -> list[Tensor]:  # fmt: skip
    grads = [torch.empty_like(out), out.new_empty(0) if context is None else torch.empty_like(context)]
    return grads + [torch.empty_like(t) for t in (matrix, offset, *weights, *biases) if parameters]


@torch.library.register_fake("glf_fast::cpu_affine_coupling")
def _(
    v: Tensor, u: Tensor, t: Tensor, log_scale: int, constant: float, add_first: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(len(v))


@torch.library.register_fake("glf_fast::cpu_affine_coupling_backward")
def _(
    grad_w: Tensor, grad_logdet: Tensor, v: Tensor, u: Tensor, t: Tensor, log_scale: int, constant: float,
    add_first: bool, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return v.new_empty(v.shape), v.new_empty(v.shape), v.new_empty(v.shape)
