"""Interpolation in the Gaussian space of a normalizing flow."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.flow import Flow

__all__ = ["arc", "flow_arc"]


def arc(u0: Tensor, u1: Tensor, steps: int) -> Tensor:
    """Noise u_t (B, steps, D) on an arc from each u₀ to its u₁ (B, D): u_t = [sin((1−t)ω)·u₀ + sin(tω)·u₁] / sin ω.

    ω is the angle between u₀ and u₁. A straight line would cross the middle of the Gaussian, where samples are very rare.
    """
    u0, u1 = u0[:, None], u1[:, None]
    t = torch.linspace(0, 1, steps, device=u0.device, dtype=u0.dtype)[:, None]
    # Parallel or opposite ends leave the arc undefined; the clamp then uses a slightly different angle.
    omega = torch.nn.functional.cosine_similarity(u0, u1, -1).clamp(-0.9999, 0.9999).acos()[..., None]
    return (((1 - t) * omega).sin() * u0 + (t * omega).sin() * u1) / omega.sin()


def flow_arc(flow: Flow, z0: Tensor, z1: Tensor, steps: int) -> Tensor:
    """Codes (B, steps, D) F⁻¹(u_t) from each code z0 to its z1 (B, D), on an arc in the base space of the flow F."""
    u = arc(flow(z0)[0], flow(z1)[0], steps)
    return flow.inverse(u.flatten(0, 1))[0].unflatten(0, (len(z0), steps))
