"""Flows that are too wide for one launch: step by step, matrix products of the library and the fused elementwise coupling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops import triton_coupling
from glf_fast.ops.options import Options

__all__ = ["coupling_flow"]


def coupling_flow(
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """`reference.coupling_flow`, or `coupling_flow_inverse` with options.inverse; arguments are checked already.

    At these widths the products are what takes time; the coupling saves the reference's eight passes over u, t and v.
    """
    passive = x.shape[1] - x.shape[1] // 2
    logdets = []
    steps = range(len(matrix))
    for k in reversed(steps) if options.inverse else steps:
        # The affine maps in full precision under autocast: a bf16 A would not match its A⁻¹.
        with torch.autocast(x.device.type, enabled=False):
            y = x if options.inverse else torch.addmm(offset[k], x, matrix[k])
        p, v = y[:, :passive], y[:, passive:]
        h = p if context is None else torch.cat([p, context.to(p.dtype)], 1)
        raw = reference.mlp(h, [w[k] for w in weights], [b[k] for b in biases], options.activation)
        u, t = raw.chunk(2, 1)
        w, logdet = triton_coupling.affine_coupling(v, u, t, options)
        logdets.append(logdet)
        x = torch.cat([p, w], 1)
        if options.inverse:
            with torch.autocast(x.device.type, enabled=False):
                x = (x - offset[k]) @ matrix[k]
    return x, torch.stack(logdets).sum(0)
