"""The arguments of one coupling of images with Glow's network as one value, and the coupling in steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glf_fast.ops.affine_coupling.call import AffineOptions
from glf_fast.ops.glow_network.call import Call as NetworkCall

__all__ = ["Call", "GlowOptions", "in_steps", "with_tensors"]


class GlowOptions(NamedTuple):
    """The options of a coupling."""

    gain_factor: float
    v_first: bool  # v is the first channels, p the last ones
    affine: AffineOptions


class Call(NamedTuple):
    """x (B, P + T, H, W), and the parameters of `reference.glow_network` in its order: of a network from P to 2·T channels."""

    x: Tensor
    parameters: tuple[Tensor, ...]
    options: GlowOptions

    @property
    def transformed(self) -> int:
        """T, the channels of v."""
        return self.parameters[6].shape[0] // 2

    def network(self, x: Tensor) -> NetworkCall:
        """The network's call."""
        return NetworkCall.of((x, *self.parameters), self.options.gain_factor)


def in_steps(
    call: Call, network: Callable[..., Tensor], coupling: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """y and logdet by functions like those of `reference`."""
    T, v_first = call.transformed, call.options.v_first
    D = call.x.shape[1]
    first, last = call.x.split((T, D - T) if v_first else (D - T, T), 1)
    p, v = (last, first) if v_first else (first, last)
    u, t = network(*call.network(p)).chunk(2, 1)
    w, logdet = coupling(v, u, t, **call.options.affine.keywords())
    p = p.to(w.dtype)
    return torch.cat((w, p) if v_first else (p, w), 1), logdet


def with_tensors(options: GlowOptions, tensors: Any) -> Call:
    """The call of x and the parameters."""
    x, *parameters = tensors
    return Call(x, tuple(parameters), options)
