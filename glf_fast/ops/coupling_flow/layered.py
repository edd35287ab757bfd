"""Flows that one launch cannot take: step by step, matrix products of the library and the fused elementwise coupling."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.affine_coupling import autograd, triton
from glf_fast.ops.affine_coupling.call import Call as AffineCall
from glf_fast.ops.backends import TRITON
from glf_fast.ops.coupling_flow import networks
from glf_fast.ops.coupling_flow.autograd import call_of, contiguous
from glf_fast.ops.coupling_flow.call import Call
from glf_fast.ops.coupling_flow.networks import KINDS, as_one_network
from glf_fast.ops.spline import autograd as spline_autograd
from glf_fast.ops.spline import triton as spline_triton
from glf_fast.ops.spline.call import Call as SplineCall

__all__ = ["BACKENDS", "refuses", "run"]

BACKENDS = (TRITON,)


def refuses(call: Call) -> str:
    """Why the steps cannot be taken one by one; "" where they can."""
    return networks.refuses(call.options, (*KINDS, "spline"))


def run(call: Call) -> tuple[Tensor, ...]:
    """Output and logdet, or the density alone; a differentiable function made of others.

    At these widths the products are what takes time; the coupling saves the reference's eight passes over u, t and v.
    """
    # Networks side by side would be one, with masks of one; the reference's MLPs know how to run two.
    if call.options.spline is None and not (call.options.dropout and call.options.coupling == "separate"):
        call = as_one_network(call)
    x, context, (matrix, offset, logabsdet), weights, biases, options, seed = call_of(call.options, contiguous(call))
    passive = x.shape[1] - x.shape[1] // 2
    activation = options.activation, options.activation_constant
    logdets = []
    steps = range(len(matrix))
    for k in reversed(steps) if options.inverse else steps:
        # The affine maps in full precision under autocast: a bf16 A would not match its A⁻¹.
        with torch.autocast(x.device.type, enabled=False):
            y = x if options.inverse else torch.addmm(offset[k], x, matrix[k])
        p, v = y[:, :passive], y[:, passive:]
        h = p if context is None else torch.cat([p, context.to(p.dtype)], 1)
        dropout = None if seed is None else reference.Dropout(options.dropout, seed, k)
        raw = reference.mlp(h, [w[k] for w in weights], [b[k] for b in biases], *activation, dropout)
        if options.spline is None:
            u, t = raw.chunk(2, 1)
            w, logdet = autograd.run(triton, AffineCall(v, u, t, options.affine()))
        else:
            parameters = raw.to(v.dtype).view(*v.shape, options.spline.columns)
            given = SplineCall(v.contiguous(), parameters, options.spline, options.inverse)
            w, logdet = spline_autograd.run(spline_triton, given)
        logdets.append(logdet)
        x = torch.cat([p, w], 1)
        if options.inverse:
            with torch.autocast(x.device.type, enabled=False):
                x = (x - offset[k]) @ matrix[k]
    logdet = torch.stack(logdets).sum(0)
    return (reference.log_normal(x) + logdet + logabsdet,) if options.density else (x, logdet)
