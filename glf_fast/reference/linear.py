"""Batched invertible linear layers: PLU and dense parametrisations, ActNorm folded in, application to rows and pixels.

Rows are samples, so a layer is y = x A + c, with matrices multiplied from the right. All functions take any leading batch
dimensions (…): one layer, or the K layers of a whole flow at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Plu",
    "fold_actnorm",
    "invertible_linear",
    "permutation_matrix",
    "plu_assemble",
    "slogdet_inverse",
]


class Plu(NamedTuple):
    """The arguments of `plu_assemble`."""

    permutation: Tensor
    lower: Tensor
    upper: Tensor
    log_diag: Tensor
    sign: Tensor
    log_scale: Tensor | None = None
    bias: Tensor | None = None


def permutation_matrix(permutation: Tensor, dtype: torch.dtype) -> Tensor:
    """P (…, D, D) with (P M)[i] = M[permutation[i]], from indices (…, D)."""
    return torch.nn.functional.one_hot(permutation, permutation.shape[-1]).to(dtype)


def fold_actnorm(
    W: Tensor, W_inv: Tensor | None, logabsdet: Tensor, log_scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """ActNorm then linear as one affine map: ((x + b)·e^s) W = x A + c with A = diag(e^s) W and c = (b·e^s) W.

    `W`, `W_inv` (…, D, D); `logabsdet` (…,); `log_scale` s and `bias` b (…, D), both None without ActNorm.
    Returns A, A⁻¹ = W⁻¹ diag(e^−s) (None if `W_inv` is), c (…, D), log|det A| = log|det W| + Σ s.
    """
    if log_scale is None or bias is None:
        return W, W_inv, torch.zeros_like(W[..., 0]), logabsdet
    A = torch.exp(log_scale).unsqueeze(-1) * W
    A_inv = None if W_inv is None else W_inv * torch.exp(-log_scale).unsqueeze(-2)
    # Full precision under autocast too: the maps of the two directions must match.
    with torch.autocast(W.device.type, enabled=False):
        c = (bias.unsqueeze(-2) @ A).squeeze(-2)
    return A, A_inv, c, logabsdet + log_scale.sum(-1)


def plu_assemble(
    permutation: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diag: Tensor,
    sign: Tensor,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    need_inverse: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """W = P L (U + diag(d)), d = sign·e^(log d), folded with ActNorm into x A + c; Glow (arXiv:1807.03039), eq. 10.

    `permutation` (…, D) int64; `lower`, `upper` (…, D, D), read strictly below and above the diagonal; `log_diag`, `sign`
    (…, D); `log_scale`, `bias` (…, D) of the ActNorm before it, or None. O(D³) a layer, no determinant is computed:
    log|det W| = Σ log d.
    Returns A, A⁻¹ (None unless `need_inverse`), c (…, D), log|det A| (…,).
    """
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    L = lower.tril(-1) + eye
    U = upper.triu(1) + torch.diag_embed(sign * torch.exp(log_diag))
    P = permutation_matrix(permutation, lower.dtype)
    W_inv = None
    # Full precision under autocast too: a bf16 A would not match its A⁻¹.
    with torch.autocast(lower.device.type, enabled=False):
        W = P @ (L @ U)
        if need_inverse:
            L_inv = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False, unitriangular=True)
            W_inv = torch.linalg.solve_triangular(U, L_inv, upper=True) @ P.mT
    return fold_actnorm(W, W_inv, log_diag.sum(-1), log_scale, bias)


def slogdet_inverse(W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sign det W, log|det W|, W⁻¹ and LAPACK's `info` of dense matrices (…, D, D).

    A singular matrix gives (0, −inf), info > 0 and an inverse without meaning; nothing is raised.
    Gradients: of log|det| g·W⁻ᵀ, of the inverse −W⁻ᵀ G W⁻ᵀ.
    """
    sign, logabsdet = torch.linalg.slogdet(W)
    inverse, info = torch.linalg.inv_ex(W)
    return sign.detach(), logabsdet, inverse, info


def invertible_linear(
    x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """y = x A + c on the channels of x; for images the 1×1 convolution of Glow (arXiv:1807.03039), section 3.2.

    `x` (B, D) or (B, D, H, W); `matrix` (D, D): A, or A⁻¹ when `inverse`, which computes (x − c) A⁻¹; `offset` c (D,);
    `logabsdet` (): log|det A|. Returns y like x and logdet (B,) = ± pixels · log|det A|.
    """
    pixels = x.shape[2:].numel()
    rows = x.movedim(1, -1)
    # Full precision under autocast too: the state of a flow is never rounded to bf16.
    with torch.autocast(x.device.type, enabled=False):
        rows = (rows - offset) @ matrix if inverse else rows @ matrix + offset
    logdet = (-pixels if inverse else pixels) * logabsdet
    return rows.movedim(-1, 1), logdet.expand(len(x))
