"""The declaration of a coupling, the same for vectors and images, whatever library it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glf_fast.conversion.chains import ContextColumns, Part
from glf_fast.conversion.images import Outputs
from glf_fast.conversion.layers import Conditioner, Coupling, Unfusable
from glf_fast.conversion.mlp import scale_outputs, select_outputs, separate, widen_inputs
from glf_fast.conversion.residual import read_network
from glf_fast.ops.checks import check_spline
from glf_fast.reference import Spline

__all__ = ["DeclaredCoupling"]

# Columns from which an affine coupling on vectors is faster with the library's own network, too, because it makes fewer passes
# over them: ten AllInOneBlocks of 373 columns, 512 rows, with dropout, one Zen 3 core, are 1.3 times as fast in a training step
# and 1.6 times in log_prob. Of 8 to 16 columns such couplings are 0.8 to 0.9 times as fast: Python takes all the time.
_WIDE = 256


@dataclass(frozen=True)
class DeclaredCoupling:
    """v → v·e^ℓ + t with ℓ = f(u), or as `add_first` and `undo` say (see `Coupling`); u and t are a network's outputs.

    The network is given, besides p, the context as its second "argument", "none" of it, or some of its columns in one
    input, behind the passive ones.
    """

    passive: Tensor  # columns, or channels, that stay (P)
    transformed: Tensor  # those that are changed (T)
    network: nn.Module | tuple[nn.Module, nn.Module]  # two: one for u and one for t
    # Of one's outputs: "ut" [u | t], "tu" [t | u], "tutu" t₀, u₀, t₁, u₁, …, "t": t alone, no scale, or "spline": the
    # parameters of each column's spline side by side.
    layout: str
    log_scale: str = "exp"  # f, by the names of `glf_fast.reference.log_scale`
    constant: float | None = None
    factor_u: float = 1.0  # the library multiplies u by it, and t by the next
    factor_t: float = 1.0
    add_first: bool = False
    undo: bool = False
    context: str | ContextColumns = "argument"
    spline: Spline | None = None
    joined: bool = False  # the network takes one input, p with the context behind it

    def read(self, part: Part) -> Coupling:
        """The layer that it is: with a `Conditioner` on vectors, with the library's own network on images; raises Unfusable.

        Splines and wide couplings on vectors, too, have the library's own network where no `Conditioner` is read: the rest of
        the layer takes most of the time. So do wide couplings whose dropout is active.
        """
        if self.spline is not None:
            check_spline(self.spline)
        images = len(part.shape) > 1
        if images and not (len(self.passive) and len(self.transformed)):
            raise Unfusable("its mask leaves no channel to condition on, or none to transform")
        own = self.own_network() if images or self.spline is None or self.context == "argument" else None
        conditioner: Conditioner | Outputs | None
        try:
            conditioner = own if images else self._conditioner()
            wide = self.spline is None and part.shape[0] >= _WIDE
            if own is not None and wide and isinstance(conditioner, Conditioner) and conditioner.active:
                conditioner = own
        except Unfusable:
            worth_it = own is not None and (self.spline is not None or part.shape[0] >= _WIDE)
            if not (worth_it and len(self.passive) and len(self.transformed)):
                raise
            conditioner = own
        options = (self.log_scale, self.constant, self.add_first, self.undo, self.spline)
        return Coupling(self.passive, self.transformed, conditioner, *options, own_network=own)

    def _conditioner(self) -> Conditioner:
        """The network with outputs [u | t] or t."""
        net = (
            separate(*map(read_network, self.network))
            if isinstance(self.network, tuple)
            else read_network(self.network)
        )
        P, T = len(self.passive), len(self.transformed)
        inputs = P + len(self.context.columns) if isinstance(self.context, ContextColumns) else P
        outputs = T if self.layout == "t" else 2 * T if self.spline is None else self.spline.columns * T
        if net.n_out != outputs or (net.n_in < P if self.context == "argument" else net.n_in != inputs):
            raise Unfusable(f"its network maps {net.n_in} columns to {net.n_out} where {inputs} to {outputs} are meant")
        if net.blocks and (isinstance(self.context, ContextColumns) or net.gated != (net.n_in > P)):
            raise Unfusable("its residual network takes the context as further inputs, without gates")
        order = torch.arange(outputs, device=self.transformed.device)
        if self.layout == "tu":
            net = select_outputs(net, order.roll(T))
        elif self.layout == "tutu":
            net = select_outputs(net, torch.cat([order[1::2], order[0::2]]))
        if (self.factor_u, self.factor_t) != (1.0, 1.0):
            net = scale_outputs(net, *[self.factor_u] * (self.layout != "t"), self.factor_t)
        if isinstance(self.context, ContextColumns):
            net = widen_inputs(net, P, self.context.columns, self.context.width)
        return net

    def own_network(self) -> Outputs:
        """The library's network itself, as (p, context) → (u, t)."""
        networks = self.network if isinstance(self.network, tuple) else (self.network,)
        context = self.context if isinstance(self.context, str) else self.context.index()
        if self.joined:
            context = slice(None)
        return Outputs(networks, self.layout, self.factor_u, self.factor_t, context)
