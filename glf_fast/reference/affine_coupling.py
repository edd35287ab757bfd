"""The elementwise part of an affine coupling, for vectors and images."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.reference.log_scale import log_scale as f

__all__ = ["affine_coupling"]


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
    """w = v·e^ℓ + t with ℓ = f(u), or its inverse; RealNVP (arXiv:1605.08803), eq. 4.

    |           | multiply, then add    | add, then multiply (`add_first`, Glow) | log-det |
    |-----------|-----------------------|----------------------------------------|---------|
    | forward   | w = v·e^ℓ + t         | w = (v + t)·e^ℓ                        | Σ ℓ     |
    | `inverse` | w = (v − t)·e^(−ℓ)    | w = v·e^(−ℓ) − t                       | −Σ ℓ    |

    `v`, `u`, `t`: one shape (B, …), any strides. Returns w like v, and logdet (B,), summed over all but the batch; both
    float32 or better, whatever precision u and t came in.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    v, u, t = v.to(dtype), u.to(dtype), t.to(dtype)
    ell = f(u, log_scale, log_scale_constant)
    if inverse:
        w = v * torch.exp(-ell) - t if add_first else (v - t) * torch.exp(-ell)
        return w, -ell.flatten(1).sum(1)
    w = (v + t) * torch.exp(ell) if add_first else v * torch.exp(ell) + t
    return w, ell.flatten(1).sum(1)
