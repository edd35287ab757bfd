"""The linear layers' operations: their schemas, and what they return in shapes alone, for torch.compile.

The same on all devices, whichever of csrc's routes then brings the kernels: the C++ library, the CUDA library, CuPy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.checks import check_fake

__all__: list[str] = []

_library = torch.library.Library("glf_fast", "FRAGMENT")
_library.define(
    "plu_assemble(Tensor permutation, Tensor lower, Tensor upper, Tensor log_diag, Tensor sign, "
    "Tensor? log_scale, Tensor? bias, bool need_inverse) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "plu_assemble_backward(Tensor permutation, Tensor lower, Tensor upper, Tensor log_diag, Tensor sign, "
    "Tensor? log_scale, Tensor? bias, Tensor A, Tensor? A_inv, Tensor? grad_A, Tensor? grad_A_inv, Tensor? grad_c, "
    "Tensor? grad_logabsdet) -> Tensor[]"
)
_library.define("slogdet_inverse(Tensor A) -> (Tensor, Tensor, Tensor, Tensor)")


@torch.library.register_fake("glf_fast::plu_assemble")
def _(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diag: Tensor, sign: Tensor, log_scale: Tensor | None,
    bias: Tensor | None, need_inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_fake(lower)
    inverse = torch.empty_like(lower) if need_inverse else lower.new_empty(0)
    return torch.empty_like(lower), inverse, torch.empty_like(log_diag), lower.new_empty(len(lower))


@torch.library.register_fake("glf_fast::plu_assemble_backward")
def _(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diag: Tensor, sign: Tensor, log_scale: Tensor | None,
    bias: Tensor | None, A: Tensor, A_inv: Tensor | None, grad_A: Tensor | None, grad_A_inv: Tensor | None,
    grad_c: Tensor | None, grad_logabsdet: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t in (lower, upper, log_diag, log_scale, bias) if t is not None]


@torch.library.register_fake("glf_fast::slogdet_inverse")
def _(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return A.new_empty(len(A)), A.new_empty(len(A)), torch.empty_like(A), A.new_empty(len(A), dtype=torch.int32)
