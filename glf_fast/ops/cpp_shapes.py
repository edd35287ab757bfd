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


@torch.library.register_fake("glf_fast::plu_assemble")
def _(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diag: Tensor, sign: Tensor, log_scale: Tensor | None,
    bias: Tensor | None, need_inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inverse = torch.empty_like(lower) if need_inverse else lower.new_empty(0)
    return torch.empty_like(lower), inverse, torch.empty_like(log_diag), lower.new_empty(len(lower))


@torch.library.register_fake("glf_fast::plu_assemble_backward")
def _(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diag: Tensor, sign: Tensor, log_scale: Tensor | None,
    bias: Tensor | None, A: Tensor, A_inv: Tensor | None, grad_A: Tensor | None, grad_A_inv: Tensor | None,
    grad_c: Tensor | None, grad_logabsdet: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t in (lower, upper, log_diag, log_scale, bias) if t is not None]


@torch.library.register_fake("glf_fast::lu_factor")
def _(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(A), A.new_empty(A.shape[:2], dtype=torch.int32), A.new_empty(len(A), dtype=torch.int32)


@torch.library.register_fake("glf_fast::slogdet_inverse")
def _(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return A.new_empty(len(A)), A.new_empty(len(A)), torch.empty_like(A), A.new_empty(len(A), dtype=torch.int32)
