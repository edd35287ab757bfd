"""The coupling flow: K steps of ActNorm → InvertibleLinear → coupling, with stacked parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.sequential import SequentialFlow
from glf_fast.flow.spline_coupling import spline_of
from glf_fast.flow.stacked_flow import StackedFlow
from glf_fast.flow.stacking import Stacked, configuration, fill_step, new_step, stacked
from glf_fast.ops.checks import (
    check_activation,
    check_choice,
    check_dropout,
    check_log_scale,
    check_network_of,
    check_spline_of,
)
from glf_fast.reference import ACTIVATIONS, LOG_SCALES, Plu, Spline
from glf_fast.reference import COUPLINGS as KINDS

__all__ = ["CouplingFlow"]

COUPLINGS = tuple(KINDS)


class CouplingFlow(StackedFlow):
    """K steps of ActNorm, invertible linear layer and coupling on vectors (B, D): Glow's step, arXiv:1807.03039.

    Every parameter is stored stacked, (K, …), so that one kernel can walk all steps and the optimizer sees few tensors.
    `to_layers` gives the same flow layer by layer, `from_layers` stacks one.

    Args:
        dim: D, at least 2; odd is fine (the passive half is the larger one).
        steps: K.
        hidden: widths of the zero to eight hidden layers of each step's MLP, or the width of each of one to five residual
            blocks, all equal.
        context_dim: columns of the context that conditions every coupling; 0 for none.
        coupling: "affine", v·e^f(u) + t with u and t from one MLP; "separate", the same with an MLP for each, as in RealNVP
            (arXiv:1605.08803); "additive", v + t, as in NICE (arXiv:1410.8516); "spline", a rational-quadratic spline of each
            v, as in Neural Spline Flows (arXiv:1906.04032). To the last two log-scale and `add_first` mean nothing.
        network: "mlp", or "residual", a `ResidualNet` with the context as a gate, for all couplings but "separate".
        spline: bins, box and the rest of those splines, a `glf_fast.Spline`, or the same as a mapping.
        activation: of the hidden layers: relu, leaky_relu, silu, gelu, tanh, elu, selu, hardswish, softplus or mish.
        activation_constant: the slope of leaky_relu below 0, or α of elu; None is PyTorch's default.
        dropout: probability with which hidden units are dropped in training mode: behind every activation of an MLP, and
            behind the second one of a residual block. Each call draws its seed from torch's generator of the processor.
            `fit` then takes the ordinary loop, and a GPU runs the networks layer by layer.
        log_scale, log_scale_constant: how the log-scale is bounded, see `glf_fast.reference.log_scale`.
        add_first: couplings add before they multiply, as Glow does.
        linear: "plu", "dense" or "permutation", see `InvertibleLinear`.
        actnorm: with an ActNorm in each step; its start is set by the first training batch.
        reversible: train with activations independent of K, by undoing the steps in the backward: slower, and in
            float32 gradients lose what the conditioning of the steps loses.

    Example:
        >>> flow = CouplingFlow(dim=5, steps=4, hidden=(64, 64))
        >>> z, logdet = flow(torch.randn(10, 5))
        >>> flow.log_prob(torch.randn(10, 5)).shape, flow.sample(3).shape
        (torch.Size([10]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        dim: int,
        steps: int = 8,
        hidden: Sequence[int] = (256, 256),
        context_dim: int = 0,
        *,
        coupling: str = "affine",
        network: str = "mlp",
        activation: str = "relu",
        activation_constant: float | None = None,
        dropout: float = 0.0,
        log_scale: str = "tanh",
        log_scale_constant: float | None = None,
        add_first: bool = False,
        spline: Spline | Mapping[str, Any] | None = None,
        linear: str = "plu",
        actnorm: bool = True,
        reversible: bool = False,
    ) -> None:
        check_choice("coupling", coupling, COUPLINGS)
        check_network_of(coupling, network)
        check_activation(activation, activation_constant)
        check_dropout(dropout)
        check_log_scale(log_scale, log_scale_constant)
        kind = None if coupling != "spline" and spline is None else spline_of(spline)
        check_spline_of(coupling, kind)
        config: dict[str, Any] = {
            "dim": dim,
            "steps": steps,
            "hidden": tuple(hidden) if isinstance(hidden, Sequence) else hidden,
            "context_dim": context_dim,
            "coupling": coupling,
            "network": network,
            "activation": activation,
            "activation_constant": ACTIVATIONS[activation] if activation_constant is None else activation_constant,
            "dropout": float(dropout),
            "log_scale": log_scale,
            "log_scale_constant": LOG_SCALES[log_scale] if log_scale_constant is None else log_scale_constant,
            "add_first": add_first,
            "spline": kind and kind._asdict(),
            "linear": linear,
            "actnorm": actnorm,
            "reversible": reversible,
        }
        super().__init__(config, linear)
        if dim < 2:
            raise ValueError(f"dim must be at least 2, to have a passive and a transformed half; got {dim}")
        names = ("coupling", "network", "activation", "activation_constant", "log_scale", "log_scale_constant")
        self._options = {name: self.config[name] for name in (*names, "add_first", "reversible")} | {"spline": kind}
        self._take([layer for _ in range(steps) for layer in new_step(self.config)])

    # -- the flow as a function ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, D) → z (B, D), logdet (B,)."""
        context = self._begin(x, context)
        weights, biases = self._mlp()
        A, _, c, logabsdet = self._affine(weights[0].dtype, need_inverse=False)
        options = self._dropping() if self.training and self.config["dropout"] else self._options
        z, logdet = ops.coupling_flow(x, A, c, weights, biases, context, row_scales=self._only_scales(), **options)
        return z, logdet + logabsdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, D) → x (B, D), logdet (B,)."""
        if context is not None or self.context_shape:
            context = self._context("z", z, context)
        weights, biases = self._mlp()
        _, A_inv, c, logabsdet = self._affine(weights[0].dtype, need_inverse=True)
        assert A_inv is not None
        options = self._dropping() if self.training and self.config["dropout"] else self._options
        x, logdet = ops.coupling_flow_inverse(z, A_inv, c, weights, biases, context, **options)
        return x, logdet - logabsdet

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) = log N(z; 0, I) + logdet in nats, (B,)."""
        context = self._begin(x, context)
        weights, biases = self._mlp()
        options = self._dropping() if self.training and self.config["dropout"] else self._options
        if self.config["linear"] == "plu" and torch.is_grad_enabled():
            linear, actnorm = self._map_tensors()
            plu = Plu(**linear, log_scale=actnorm[0], bias=actnorm[1])
            if any(t is not None and t.requires_grad for t in plu):
                return ops.plu_flow_log_prob(x, plu, weights, biases, context, **options)
        A, _, c, logabsdet = self._affine(weights[0].dtype, need_inverse=False)
        return ops.coupling_flow_log_prob(
            x, A, c, logabsdet, weights, biases, context, row_scales=self._only_scales(), **options
        )

    def _dropping(self) -> dict[str, Any]:
        """The operation's options for a call in training mode, with units of its own to drop."""
        seed = torch.randint(2**63 - 1, (), device="cpu")
        return {**self._options, "dropout": self.config["dropout"], "seed": seed}

    # ActNorms start from what the steps make of all units.
    def _run_step(
        self, k: int, x: Tensor, A: Tensor, c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor],
        context: Tensor | None,
    ) -> Tensor:  # fmt: skip
        step = slice(k, k + 1)
        return ops.coupling_flow(
            x, A, c, [w[step] for w in weights], [b[step] for b in biases], context, **self._options
        )[0]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.config.setdefault("dropout", 0.0)
        for name, value in (
            ("network", "mlp"),
            ("activation_constant", ACTIVATIONS[self.config["activation"]]),
            ("spline", None),
        ):  # of a flow that was pickled before there were others
            self.config.setdefault(name, value)
            self._options.setdefault(name, value)
        self.__dict__.setdefault("_linear", self.config["linear"])

    # -- stacked parameters ⇄ layers -----------------------------------------------------------------------------------

    def _take(self, layers: Sequence[nn.Module]) -> None:
        """Take over copies of the layers' parameters and buffers, stacked over the steps."""
        self._hold_stacked(stacked(layers, self.config))

    @classmethod
    def from_layers(cls, flow: SequentialFlow) -> CouplingFlow:
        """Stack a flow of K equal steps ([ActNorm,] InvertibleLinear, coupling with an MLP or ResidualNet); values are copied.

        Raises ValueError that names the first layer that breaks the pattern.
        """
        made = cls(**configuration(flow))
        made._take(list(flow.layers))
        made.train(flow.training)
        return made

    def to_layers(self) -> SequentialFlow:
        """The same flow layer by layer, with copies of the values: for surgery, reading, or mixing with other layers.

        Frozen entries come with their values, and fixed factors are multiplied in: all is ordinary parameters that are trained.
        """
        linear, (log_scale, bias) = self._map_tensors()
        actnorm: dict[str, Tensor] = {}
        if log_scale is not None and bias is not None:
            actnorm = {"log_scale": log_scale, "bias": bias, "initialized": self.actnorm_initialized}
        values = Stacked(actnorm, linear, *self._mlp())
        layers: list[nn.Module] = []
        for k in range(self.config["steps"]):
            step = nn.ModuleList(new_step(self.config)).to(self.mlp_weights[0])
            fill_step(list(step), values, k)
            layers += step
        return SequentialFlow(layers, self.event_shape, self.context_dim).train(self.training)
