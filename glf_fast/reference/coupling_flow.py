"""A whole flow: K steps of affine map (ActNorm and invertible linear, folded) and affine coupling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glf_fast.reference.coupling import COUPLINGS
from glf_fast.reference.dropout import Dropout
from glf_fast.reference.linear import Plu, plu_assemble
from glf_fast.reference.networks import NETWORKS
from glf_fast.reference.spline import Spline

__all__ = ["coupling_flow", "coupling_flow_inverse", "coupling_flow_log_prob", "log_normal", "plu_flow_log_prob"]


def coupling_flow(
    x: Tensor,
    A: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    *,
    coupling: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    spline: Spline | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Data → noise. For k = 0 … K−1, with P = D − D//2 passive columns p and D//2 transformed columns v:

        y = x A_k + c_k;   (p, v) = y[:, :P], y[:, P:];   (u, t) = network_k([p, context]);   x ← [p, v·e^f(u) + t]

    `x` (B, D); `A` (K, D, D), `c` (K, D); `context` (B, C) or None; the options as in `affine_coupling` and `mlp`.
    `coupling` says what the networks make, and so the shapes of `weights[i]` and `biases[i]`, from n₀ = P + C columns on:

    | `coupling` | x's transformed half | `weights[i]`       | `biases[i]`  | last width |                           |
    |------------|----------------------|--------------------|--------------|------------|---------------------------|
    | "affine"   | v·e^f(u) + t         | (K, nᵢ, nᵢ₊₁)      | (K, nᵢ₊₁)    | 2·(D//2)   | one network makes [u, t]  |
    | "separate" | v·e^f(u) + t         | (K, 2, nᵢ, nᵢ₊₁)   | (K, 2, nᵢ₊₁) | D//2       | one for u, and one for t  |
    | "additive" | v + t                | (K, nᵢ, nᵢ₊₁)      | (K, nᵢ₊₁)    | D//2       | NICE (arXiv:1410.8516)    |
    | "spline"   | a spline of v        | (K, nᵢ, nᵢ₊₁)      | (K, nᵢ₊₁)    | n·(D//2)   | n = `spline.columns`      |

    With `dropout` p > 0 hidden units are dropped with this probability, by `seed`: see `Dropout`.

    These are the shapes of `network` "mlp". Those of "residual", which is no network of "separate", are in `residual`.

    Returns z (B, D) and Σ_k Σ ℓ (B,), both float32 or better: the caller adds Σ_k log|det A_k|, which no sample changes.
    """
    assert seed is not None or not dropout
    transform, conditioner = COUPLINGS[coupling].transform, NETWORKS[network]
    options: dict[str, Any] = {
        "log_scale": log_scale,
        "log_scale_constant": log_scale_constant,
        "add_first": add_first,
        "spline": spline,
    }
    passive = x.shape[1] - x.shape[1] // 2
    logdet = x.new_zeros(len(x))
    for k in range(len(A)):
        # Full precision under autocast: a bf16 A would not match the A⁻¹ of the inverse.
        with torch.autocast(x.device.type, enabled=False):
            y = x @ A[k] + c[k]
        p, v = y[:, :passive], y[:, passive:]
        given = None if context is None else context.to(p.dtype)
        h = p if given is None else torch.cat([p, given], 1)
        drop = Dropout(dropout, seed, k) if seed is not None and dropout else None
        raw = conditioner(
            h, [w[k] for w in weights], [b[k] for b in biases], given, activation, activation_constant, drop
        )
        v, ldj = transform(v, raw, inverse=False, **options)
        x = torch.cat([p, v], 1)
        logdet = logdet + ldj
    return x, logdet


def coupling_flow_inverse(
    z: Tensor,
    A_inv: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    *,
    coupling: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    spline: Spline | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise → data: the steps of `coupling_flow` undone in reverse order, with `A_inv` (K, D, D) = A⁻¹.

        (p, v) = z[:, :P], z[:, P:];   (u, t) = network_k([p, context]);   z ← ([p, (v − t)·e^−f(u)] − c_k) A_k⁻¹

    Returns x (B, D) and −Σ_k Σ ℓ (B,).
    """
    assert seed is not None or not dropout
    transform, conditioner = COUPLINGS[coupling].transform, NETWORKS[network]
    options: dict[str, Any] = {
        "log_scale": log_scale,
        "log_scale_constant": log_scale_constant,
        "add_first": add_first,
        "spline": spline,
    }
    passive = z.shape[1] - z.shape[1] // 2
    logdet = z.new_zeros(len(z))
    for k in reversed(range(len(A_inv))):
        p, v = z[:, :passive], z[:, passive:]
        given = None if context is None else context.to(p.dtype)
        h = p if given is None else torch.cat([p, given], 1)
        drop = Dropout(dropout, seed, k) if seed is not None and dropout else None
        raw = conditioner(
            h, [w[k] for w in weights], [b[k] for b in biases], given, activation, activation_constant, drop
        )
        v, ldj = transform(v, raw, inverse=True, **options)
        with torch.autocast(z.device.type, enabled=False):
            z = (torch.cat([p, v], 1) - c[k]) @ A_inv[k]
        logdet = logdet + ldj
    return z, logdet


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) (B,) of z (B, …)."""
    z = z.flatten(1)
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


def actnorm_log_prob(x: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """log N((x + b)·e^s; 0, I) + Σ s in nats, (B,), of x (B, D), with `log_scale` s and `bias` b (D,)."""
    return log_normal((x + bias) * torch.exp(log_scale)) + log_scale.sum()


def coupling_flow_log_prob(
    x: Tensor,
    A: Tensor,
    c: Tensor,
    logabsdet: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """log p(x) = log N(z; 0, I) + Σ ℓ + `logabsdet` in nats, (B,), with z and Σ ℓ of `coupling_flow`.

    `logabsdet` is Σ_k log|det A_k|, a scalar tensor; `options` as there.
    """
    z, logdet = coupling_flow(x, A, c, weights, biases, context, **options)
    return log_normal(z) + logdet + logabsdet


def plu_flow_log_prob(
    x: Tensor,
    plu: Plu,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`coupling_flow_log_prob` with the affine maps that `plu_assemble` makes of `plu`, its arguments for all K layers."""
    A, _, c, logabsdet = plu_assemble(*plu, need_inverse=False)
    return coupling_flow_log_prob(x, A, c, logabsdet.sum(), weights, biases, context, **options)
