"""Interpolation of codes in the Gaussian space of a normalizing flow."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.flow import Flow

__all__ = ["flow_arc"]


def flow_arc(flow: Flow, z0: Tensor, z1: Tensor, steps: int) -> Tensor:
    """Codes (B, steps, D) F⁻¹(u_t) from each code z0 to its z1 (B, D), on an arc in the base space of the flow F.

    The arc is u_t = [sin((1−t)ω)·u₀ + sin(tω)·u₁] / sin ω, with the angle ω between u₀ and u₁. A straight line would cross the
    middle of the Gaussian, where samples are very rare.
    """
    u0, u1 = (flow(z)[0][:, None] for z in (z0, z1))
    t = torch.linspace(0, 1, steps, device=u0.device, dtype=u0.dtype)[:, None]
    # Parallel or opposite ends leave the arc undefined; the clamp then uses a slightly different angle.
    omega = torch.nn.functional.cosine_similarity(u0, u1, -1).clamp(-0.9999, 0.9999).acos()[..., None]
    u = (((1 - t) * omega).sin() * u0 + (t * omega).sin() * u1) / omega.sin()
    return flow.inverse(u.flatten(0, 1))[0].unflatten(0, (len(z0), steps))
