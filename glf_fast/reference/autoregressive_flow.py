"""A whole masked autoregressive flow: K steps of affine map and autoregressive transform of every feature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glf_fast.reference.coupling_flow import log_normal
from glf_fast.reference.log_scale import log_scale as log_scale_of
from glf_fast.reference.made import made
from glf_fast.reference.spline import Spline
from glf_fast.reference.spline import spline as rational_quadratic

__all__ = ["TRANSFORMS", "autoregressive_flow", "autoregressive_flow_inverse", "autoregressive_flow_log_prob"]

# Kinds of transform: name → numbers that a network makes for each feature; 0: as many as its kind of spline has.
TRANSFORMS: dict[str, int] = {"affine": 2, "spline": 0}


def autoregressive_flow(
    x: Tensor,
    A: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    fan_in: Tensor,
    context: Tensor | None = None,
    *,
    transform: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    spline: Spline | None = None,
    context_layer: bool = False,
) -> tuple[Tensor, Tensor]:
    """Data → noise. For k = 0 … K−1:

        y = x A_k + c_k;   θ_d = MADE_k(y_<d, context) of every feature d;   x_d ← T(y_d; θ_d)

    with T(v; u, t) = v·e^f(u) + t ("affine"), or a rational-quadratic spline of v ("spline").

    `x` (B, D); `A` (K, D, D), `c` (K, D); `weights`, `biases` and `fan_in` those of `made` with a dimension K before;
    `context` (B, C) or None. Returns z (B, D) and Σ_k Σ log T' (B,), both float32 or better.

    Papamakarios et al., Masked Autoregressive Flow, arXiv:1705.07057.
    """
    options: dict[str, Any] = {
        "network": network,
        "activation": activation,
        "activation_constant": activation_constant,
        "context_layer": context_layer,
    }
    elementwise = _elementwise(transform, log_scale, log_scale_constant, spline)
    logdet = x.new_zeros(len(x))
    for k in range(len(A)):
        # Full precision under autocast: a bf16 A would not match the A⁻¹ of the inverse.
        with torch.autocast(x.device.type, enabled=False):
            y = x @ A[k] + c[k]
        given = None if context is None else context.to(y.dtype)
        raw = made(y, [w[k] for w in weights], [b[k] for b in biases], fan_in[k], given, **options)
        x, ldj = elementwise(y, raw.unflatten(1, (y.shape[1], -1)), False)
        logdet = logdet + ldj
    return x, logdet


def autoregressive_flow_inverse(
    z: Tensor,
    A_inv: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    fan_in: Tensor,
    context: Tensor | None = None,
    *,
    transform: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    spline: Spline | None = None,
    context_layer: bool = False,
) -> tuple[Tensor, Tensor]:
    """Noise → data: the steps of `autoregressive_flow` undone in reverse order, with `A_inv` (K, D, D) = A⁻¹.

        for d = 1 … D:  θ_d = MADE_k(y_<d, context);  y_d = T⁻¹(z_d; θ_d);       then z ← (y − c_k) A_k⁻¹

    D passes of the network here. Kernels need the arithmetic of one: y_d extends the hidden units that see it, once.
    Returns x (B, D) and −Σ_k Σ log T' (B,).
    """
    options: dict[str, Any] = {
        "network": network,
        "activation": activation,
        "activation_constant": activation_constant,
        "context_layer": context_layer,
    }
    elementwise = _elementwise(transform, log_scale, log_scale_constant, spline)
    logdet = z.new_zeros(len(z))
    for k in reversed(range(len(A_inv))):
        given = None if context is None else context.to(z.dtype)
        known = z.new_zeros(len(z), 0)
        for d in range(z.shape[1]):
            y = torch.cat([known, z.new_zeros(len(z), z.shape[1] - d)], 1)
            raw = made(y, [w[k] for w in weights], [b[k] for b in biases], fan_in[k], given, **options)
            y_d, ldj = elementwise(z[:, d : d + 1], raw.unflatten(1, (z.shape[1], -1))[:, d : d + 1], True)
            known = torch.cat([known, y_d], 1)
            logdet = logdet + ldj
        with torch.autocast(z.device.type, enabled=False):
            z = (known - c[k]) @ A_inv[k]
    return z, logdet


def autoregressive_flow_log_prob(
    x: Tensor,
    A: Tensor,
    c: Tensor,
    logabsdet: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    fan_in: Tensor,
    context: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """log p(x) = log N(z; 0, I) + Σ log T' + `logabsdet` in nats, (B,), with z and the sum of `autoregressive_flow`.

    `logabsdet` is Σ_k log|det A_k|, a scalar tensor; `options` as there.
    """
    z, logdet = autoregressive_flow(x, A, c, weights, biases, fan_in, context, **options)
    return log_normal(z) + logdet + logabsdet


def _elementwise(
    transform: str, log_scale: str, constant: float | None, spline: Spline | None
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    """(v (B, D), raw (B, D, n), inverse) → T(v) or T⁻¹(v) (B, D) and log|det| (B,)."""

    def affine(v: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(v.dtype, torch.float32)
        u, t = raw.to(dtype).unbind(-1)
        ell = log_scale_of(u, log_scale, constant)
        return ((v - t) * torch.exp(-ell), -ell.sum(1)) if inverse else (v * torch.exp(ell) + t, ell.sum(1))

    def splines(v: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        w, log_slope = rational_quadratic(v, raw, spline or Spline(), inverse=inverse)
        return w, log_slope.sum(1)

    return affine if transform == "affine" else splines
