"""The coupling flow: K steps of ActNorm → InvertibleLinear → coupling, with stacked parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.actnorm import data_dependent_start, set_by_another_process
from glf_fast.flow.assembled import AssembledMaps
from glf_fast.flow.base import Flow
from glf_fast.flow.frozen import FixedFactor, FrozenEntries
from glf_fast.flow.indices import Indices
from glf_fast.flow.linear import LINEAR_TENSORS
from glf_fast.flow.moments import active_processes
from glf_fast.flow.sequential import SequentialFlow
from glf_fast.flow.spline_coupling import spline_of
from glf_fast.flow.stacking import Stacked, configuration, fill_step, new_step, stacked
from glf_fast.ops.checks import (
    check_choice,
    check_log_scale,
    check_network_of,
    check_shape,
    check_spline_of,
    check_state,
    check_tensors,
)
from glf_fast.reference import COUPLINGS as KINDS
from glf_fast.reference import LOG_SCALES, Plu, Spline

__all__ = ["CouplingFlow"]

COUPLINGS = tuple(KINDS)
# The names under which a flow stores what its maps are made of, by the kind of linear layer, with and without ActNorms.
ACTNORM = ("actnorm_log_scale", "actnorm_bias")
STORED = {
    (linear, actnorm): tuple(f"linear_{name}" for name in names) + ACTNORM * actnorm
    for linear, names in LINEAR_TENSORS.items()
    for actnorm in (False, True)
}


class CouplingFlow(Flow):
    """K steps of ActNorm, invertible linear layer and coupling on vectors (B, D): Glow's step, arXiv:1807.03039.

    Every parameter is stored stacked, (K, …), so that one kernel can walk all steps and the optimizer sees few tensors.
    `to_layers` gives the same flow layer by layer, `from_layers` stacks one.

    Args:
        dim: D, at least 2; odd is fine (the passive half is the larger one).
        steps: K.
        hidden: widths of the one to four hidden layers of each step's MLP, or the width of each of one to five residual
            blocks, all equal.
        context_dim: columns of the context that conditions every coupling; 0 for none.
        coupling: "affine", v·e^f(u) + t with u and t from one MLP; "separate", the same with an MLP for each, as in RealNVP
            (arXiv:1605.08803); "additive", v + t, as in NICE (arXiv:1410.8516); "spline", a rational-quadratic spline of each
            v, as in Neural Spline Flows (arXiv:1906.04032). To the last two log-scale and `add_first` mean nothing.
        network: "mlp", or "residual", a `ResidualNet` with the context as a gate, for all couplings but "separate".
        spline: bins, box and the rest of those splines, a `glf_fast.Spline`, or the same as a mapping.
        activation: of the hidden layers: relu, leaky_relu, silu, gelu, tanh or elu.
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

    actnorm_log_scale: Tensor
    actnorm_bias: Tensor
    actnorm_initialized: Tensor
    mlp_weights: nn.ParameterList
    mlp_biases: nn.ParameterList

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
        log_scale: str = "tanh",
        log_scale_constant: float | None = None,
        add_first: bool = False,
        spline: Spline | Mapping[str, Any] | None = None,
        linear: str = "plu",
        actnorm: bool = True,
        reversible: bool = False,
    ) -> None:
        super().__init__((dim,), context_dim)
        if dim < 2:
            raise ValueError(f"dim must be at least 2, to have a passive and a transformed half; got {dim}")
        if not isinstance(hidden, Sequence):
            raise TypeError(f"hidden must be a sequence of widths, such as (64, 64); got {hidden!r}")
        if steps < 1:
            raise ValueError(f"steps must be ≥ 1; got {steps}")
        if context_dim < 0:
            raise ValueError(f"context_dim must be ≥ 0; got {context_dim}")
        check_choice("coupling", coupling, COUPLINGS)
        check_network_of(coupling, network)
        check_log_scale(log_scale, log_scale_constant)
        kind = None if coupling != "spline" and spline is None else spline_of(spline)
        check_spline_of(coupling, kind)
        self._maps = AssembledMaps()
        self.config: dict[str, Any] = {
            "dim": dim,
            "steps": steps,
            "hidden": tuple(hidden),
            "context_dim": context_dim,
            "coupling": coupling,
            "network": network,
            "activation": activation,
            "log_scale": log_scale,
            "log_scale_constant": LOG_SCALES[log_scale] if log_scale_constant is None else log_scale_constant,
            "add_first": add_first,
            "spline": kind and kind._asdict(),
            "linear": linear,
            "actnorm": actnorm,
            "reversible": reversible,
        }
        names = ("coupling", "network", "activation", "log_scale", "log_scale_constant", "add_first", "reversible")
        self._options = {name: self.config[name] for name in names} | {"spline": kind}
        self.held = nn.ModuleDict()  # FrozenEntries by parameter, filled by `hold`
        self.factors = nn.ModuleDict()  # FixedFactor by parameter, filled by `multiply`
        self._adjusts = False  # whether one of the two has an entry, which takes longer to ask than a small MLP to run
        self._take([layer for _ in range(steps) for layer in new_step(self.config)])

    # -- the flow as a function ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, D) → z (B, D), logdet (B,)."""
        context = self._begin(x, context)
        weights, biases = self._mlp()
        A, _, c, logabsdet = self._affine(weights[0].dtype, need_inverse=False)
        z, logdet = ops.coupling_flow(x, A, c, weights, biases, context, **self._options)
        return z, logdet + logabsdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, D) → x (B, D), logdet (B,)."""
        if context is not None or self.context_shape:
            context = self._context("z", z, context)
        weights, biases = self._mlp()
        _, A_inv, c, logabsdet = self._affine(weights[0].dtype, need_inverse=True)
        assert A_inv is not None
        x, logdet = ops.coupling_flow_inverse(z, A_inv, c, weights, biases, context, **self._options)
        return x, logdet - logabsdet

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) = log N(z; 0, I) + logdet in nats, (B,)."""
        context = self._begin(x, context)
        weights, biases = self._mlp()
        if self.config["linear"] == "plu" and torch.is_grad_enabled():
            linear, actnorm = self._map_tensors()
            plu = Plu(**linear, log_scale=actnorm[0], bias=actnorm[1])
            if any(t is not None and t.requires_grad for t in plu):
                return ops.plu_flow_log_prob(x, plu, weights, biases, context, **self._options)
        A, _, c, logabsdet = self._affine(weights[0].dtype, need_inverse=False)
        return ops.coupling_flow_log_prob(x, A, c, logabsdet, weights, biases, context, **self._options)

    def _begin(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """The context as (B, C); gives ActNorms their start where this is the first training batch."""
        if context is not None or self.context_shape:
            context = self._context("x", x, context)
        if not self._started and self.training:
            check_tensors(x=x)
            if x.ndim == 2 and (len(x) >= 2 or active_processes() is not None):
                self._start(x, context)
        return context

    def _context(self, name: str, x: Tensor, context: Tensor | None) -> Tensor | None:
        """The context as (B, C), for an input of this name."""
        try:
            batch = len(x) if x.ndim else 0  # what x must be, the operation says
        except AttributeError:
            check_tensors(**{name: x})
            raise
        return self._expand_context(context, batch)

    def _affine(self, dtype: torch.dtype, *, need_inverse: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """A, A⁻¹, c (K, …) of all steps and Σ log|det A|."""
        linear, actnorm = self._map_tensors()
        return self._maps.get(
            self.config["linear"], linear, actnorm, dtype, need_inverse=need_inverse, training=self.training
        )

    # -- parameters ----------------------------------------------------------------------------------------------------

    def _map_tensors(self) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | tuple[None, None]]:
        """The tensors of the linear layers, by the names of LINEAR_TENSORS, and log-scale and bias of the ActNorms.

        Frozen entries are at their values, and fixed factors are applied.
        """
        config = self.config
        parameters, buffers, found = self._parameters, self._buffers, []
        indices, order = self._indices, buffers.get("linear_permutation")
        if (  # `Indices.check` asks the same; a call of it shows at B = 1
            indices is not None
            and order is not None
            and not torch.compiler.is_compiling()
            and (order is not indices.seen or (indices.version is not None and indices.version != order._version))
        ):
            indices.check(order, buffers.get("linear_sign"))
        for name in STORED[config["linear"], config["actnorm"]]:
            # nn.Module's own way to a tensor takes 0.6 µs, seven times a call.
            tensor: Tensor | None = parameters.get(name)
            if tensor is None:
                tensor = buffers.get(name)
            if tensor is None:  # parametrized, or sharded
                tensor = getattr(self, name)
            found.append(self._effective(name, tensor) if self._adjusts else tensor)
        actnorm = (found[-2], found[-1]) if config["actnorm"] else (None, None)
        return dict(zip(LINEAR_TENSORS[config["linear"]], found, strict=False)), actnorm

    def _mlp(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of the networks, by layer, with frozen entries and fixed factors."""
        # nn.Module's way to a ParameterList, and its iteration, which builds every name anew, show at B = 1.
        modules: dict[str, Any] = self._modules
        found = []
        for name in ("mlp_weights", "mlp_biases"):
            own: dict[str, Tensor] = modules[name]._parameters
            if tuple(own) == self._layer_names:
                tensors = list(own.values())
            else:  # pruned or parametrized
                tensors = [modules[name][i] for i in range(len(self._layer_names))]
            if self._adjusts:
                tensors = [self._effective(f"{name}_{i}", tensor) for i, tensor in enumerate(tensors)]
            found.append(tensors)
        return found[0], found[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CouplingFlow:
        super()._apply(fn, recurse)
        # Weights (K, 2, in, out) are no images, whatever memory_format a whole model is turned to.
        for weight in self.mlp_weights:
            if not weight.is_contiguous():
                weight.data = weight.data.contiguous()
        return self

    # -- frozen entries and fixed factors ------------------------------------------------------------------------------

    def hold(self, parameter: str, trained: Tensor) -> None:
        """Freeze the entries of a stacked parameter where `trained` (its shape, bool) is False at their present values.

        Frozen entries get no gradient, and whatever an optimizer does to them (weight decay) changes nothing. So steps
        of different widths, with frozen parts or with two networks side by side are stacked into one flow. Their values
        are buffers: they are saved, copied, and loaded into a flow in which nothing is frozen yet.

        Args:
            parameter: its name in `named_parameters()`, such as "mlp_weights.0" or "linear_upper".
        """
        name = parameter.replace(".", "_")
        self.held[name] = FrozenEntries(parameter, self._effective(name, self.get_parameter(parameter)), trained)
        self._adjusts = True

    def multiply(self, parameter: str, factor: Tensor) -> None:
        """Use a stacked parameter times a fixed factor from now on: gradients and an optimizer's steps are of what is stored.

        Whether a factor is in the parameter or beside it makes no difference to the flow's values, but to its training:
        Adam moves a parameter of a tenth of the size as far as one of the whole size.

        Args:
            parameter: its name, as in `hold`, before which a factor must be given.
            factor: broadcasts to the parameter's shape.

        Raises:
            AttributeError: there is no parameter of this name.
        """
        self.factors[parameter.replace(".", "_")] = FixedFactor(factor.to(self.get_parameter(parameter)))
        self._adjusts = True

    def _effective(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter times its factor, with its frozen entries at their values."""
        modules: dict[str, Any] = self._modules
        factor, frozen = modules["factors"]._modules.get(name), modules["held"]._modules.get(name)
        if factor is not None:
            parameter = parameter * factor._buffers["factor"]  # called as a module it takes twice as long
        return parameter if frozen is None else frozen(parameter)

    # -- data-dependent start ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self, x: Tensor, context: Tensor | None) -> None:
        """Give every ActNorm its start, step by step: each one sees what the steps before it make of x."""
        check_shape("x", x, (None, self.config["dim"]), "(batch, dim)")
        x = check_state("x", x, self.mlp_weights[0])
        if set_by_another_process(self.actnorm_initialized, self.actnorm_log_scale, self.actnorm_bias):
            self._started = True
            return
        weights, biases = self._mlp()
        for k in range(self.config["steps"]):
            found = data_dependent_start(x)
            if found is None:
                return
            # Of a layer that came with its start, or in an averaged copy of a flow.
            done = self.actnorm_initialized[k] > 0
            for parameter, value in zip((self.actnorm_log_scale, self.actnorm_bias), found, strict=True):
                parameter[k] = torch.where(done, parameter[k], value)
            A, _, c, _ = self._affine(x.dtype, need_inverse=False)
            step = slice(k, k + 1)
            x, _ = ops.coupling_flow(
                x, A[step], c[step], [w[step] for w in weights], [b[step] for b in biases], context, **self._options
            )
        self.actnorm_initialized.fill_(1)
        self._started = True

    def train(self, mode: bool = True) -> CouplingFlow:
        """Set the mode. Averaged permutations are restored here, too: in compiled and exported calls they cannot be."""
        super().train(mode)
        if self._indices is not None:
            self._indices.check(self.get_buffer("linear_permutation"), self._buffers.get("linear_sign"))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (
            ("network", "mlp"),
            ("spline", None),
        ):  # of a flow that was pickled before there were others
            self.config.setdefault(name, value)
            self._options.setdefault(name, value)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._indices is not None:
            self._indices.check(self.get_buffer("linear_permutation"), self._buffers.get("linear_sign"))
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        # Neither is in the config: a flow that is rebuilt from its config learns of them from the values saved.
        for name, parameter in self.named_parameters():
            flat = name.replace(".", "_")
            if (factor := state_dict.get(f"{prefix}factors.{flat}.factor")) is not None:
                self.multiply(name, torch.ones_like(factor).to(parameter))
            if f"{prefix}held.{flat}.trained" in state_dict:
                self.hold(name, torch.ones_like(parameter, dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self._started = not self.config["actnorm"] or _all_set(self.actnorm_initialized)
        if self._indices is not None:
            self._indices.load(self.get_buffer("linear_permutation"), errors)

    # -- stacked parameters ⇄ layers -----------------------------------------------------------------------------------

    def _take(self, layers: Sequence[nn.Module]) -> None:
        """Take over copies of the layers' parameters and buffers, stacked over the steps."""
        values = stacked(layers, self.config)
        for kind, tensors in (("actnorm", values.actnorm), ("linear", values.linear)):
            for name, tensor in tensors.items():
                if isinstance(tensor, nn.Parameter):
                    self.register_parameter(f"{kind}_{name}", tensor)
                else:
                    self.register_buffer(f"{kind}_{name}", tensor)
        self.mlp_weights, self.mlp_biases = nn.ParameterList(values.weights), nn.ParameterList(values.biases)
        self._layer_names = tuple(str(i) for i in range(len(values.weights)))
        order = values.linear.get("permutation")
        self._indices = None if order is None else Indices("linear_permutation", order)
        # The same as a Python bool: reading the buffer would synchronise with the GPU at every step.
        self._started = not values.actnorm or _all_set(self.actnorm_initialized)

    @classmethod
    def from_layers(cls, flow: SequentialFlow) -> CouplingFlow:
        """Stack a flow of K equal steps ([ActNorm,] InvertibleLinear, coupling with an MLP or ResidualNet); values are copied.

        Raises ValueError that names the first layer that breaks the pattern.
        """
        made = cls(**configuration(flow))
        made._take(list(flow.layers))
        return made.train(flow.training)

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

    def extra_repr(self) -> str:
        """Shown by repr: the constructor's arguments."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())


def _all_set(flags: Tensor) -> bool:
    """Whether all flags are set; on "meta" there are none yet, and a state that is loaded later brings them."""
    return flags.device.type != "meta" and bool(flags.all())
