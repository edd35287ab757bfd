"""The coupling flow: K steps of ActNorm → InvertibleLinear → AffineCoupling, with stacked parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.actnorm import ActNorm, data_dependent_start
from glf_fast.flow.affine_coupling import AffineCoupling
from glf_fast.flow.base import Flow
from glf_fast.flow.linear import LINEAR_TENSORS, InvertibleLinear, assemble
from glf_fast.flow.mlp import MLP, SeparateNetworks
from glf_fast.flow.sequential import SequentialFlow
from glf_fast.ops.checks import check_choice, check_log_scale, check_state
from glf_fast.reference import LOG_SCALES

__all__ = ["CouplingFlow"]

COUPLINGS = ("affine", "separate", "additive")


class CouplingFlow(Flow):
    """K steps of ActNorm, invertible linear layer and affine coupling on vectors (B, D): Glow's step, arXiv:1807.03039.

    Every parameter is stored stacked, (K, …), so that one kernel can walk all steps and the optimizer sees few tensors.
    `to_layers` gives the same flow layer by layer, `from_layers` stacks one.

    Args:
        dim: D, at least 2; odd is fine (the passive half is the larger one).
        steps: K.
        hidden: widths of the one to four hidden layers of each step's MLP.
        context_dim: columns of the context that conditions every coupling; 0 for none.
        coupling: "affine", v·e^f(u) + t with u and t from one MLP; "separate", the same with an MLP for each, as in RealNVP
            (arXiv:1605.08803); "additive", v + t, as in NICE (arXiv:1410.8516), to which the log-scale means nothing.
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
        activation: str = "relu",
        log_scale: str = "tanh",
        log_scale_constant: float | None = None,
        add_first: bool = False,
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
        check_log_scale(log_scale, log_scale_constant)
        self._assembled: tuple[list[Tensor], tuple[Tensor, Tensor | None, Tensor, Tensor]] | None = None
        self.config: dict[str, Any] = {
            "dim": dim,
            "steps": steps,
            "hidden": tuple(hidden),
            "context_dim": context_dim,
            "coupling": coupling,
            "activation": activation,
            "log_scale": log_scale,
            "log_scale_constant": LOG_SCALES[log_scale] if log_scale_constant is None else log_scale_constant,
            "add_first": add_first,
            "linear": linear,
            "actnorm": actnorm,
            "reversible": reversible,
        }
        names = ("activation", "log_scale", "log_scale_constant", "add_first", "reversible")
        self._options = {name: self.config[name] for name in names}
        self.held = nn.ModuleDict()  # filled by `hold`
        self._holds = False  # the same as bool(self.held), which takes longer to ask than a small MLP to run
        self._stack([layer for _ in range(steps) for layer in _new_step(self.config)])

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
        self._check_event("z", z)
        context = self._expand_context(context, len(z))
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
            linear, actnorm = self._linear(), self._actnorm()
            plu = (linear["permutation"], linear["lower"], linear["upper"], linear["log_diag"], linear["sign"])
            if any(t is not None and t.requires_grad for t in (*plu, *actnorm)):
                return ops.plu_flow_log_prob(x, (*plu, *actnorm), weights, biases, context, **self._options)
        A, _, c, logabsdet = self._affine(weights[0].dtype, need_inverse=False)
        return ops.coupling_flow_log_prob(x, A, c, logabsdet, weights, biases, context, **self._options)

    def _begin(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """Check x, return the context as (B, C), and give ActNorms their start where this is the first training batch."""
        self._check_event("x", x)
        context = self._expand_context(context, len(x))
        if self.training and not self._started and len(x) >= 2:
            self._start(x, context)
        return context

    def _affine(self, dtype: torch.dtype, *, need_inverse: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """A, A⁻¹, c (K, …) of all steps and Σ log|det A|: assembled afresh, or as long as nothing changes once for all.

        At D = 64, K = 8 the assembly takes some 45 µs, 125 with A⁻¹; at B = 1 all the rest takes 55.
        """
        actnorm, linear = self._actnorm(), self._linear()
        tensors = [t for t in (*actnorm, *linear.values()) if t is not None]
        # What is trained changes at every step. On a processor only: comparing would make a GPU wait.
        graded = torch.is_grad_enabled()
        remember = (
            tensors[0].device.type == "cpu"
            and not ((self.training or graded) and any(t.requires_grad for t in tensors))
            and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
            and torch.autograd.forward_ad._current_level < 0
            and not (torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing())  # fake tensors, symbols
        )
        kept = self._assembled  # once: another thread may replace it meanwhile
        if remember and kept is not None and ops.identical(tensors, kept[0]):
            A, A_inv, c, logabsdet = kept[1]
            if A.dtype == dtype and (A_inv is not None or not need_inverse) and not (graded and A.is_inference()):
                return A, A_inv, c, logabsdet
        A, A_inv, c, logabsdets = assemble(self.config["linear"], linear, dtype, *actnorm, need_inverse=need_inverse)
        assembled = (A, A_inv, c, logabsdets.sum())
        self._assembled = ([t.clone() for t in tensors], assembled) if remember else None
        return assembled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CouplingFlow:
        super()._apply(fn, recurse)
        for (
            weight
        ) in self.mlp_weights:  # (K, 2, in, out) is no image, whatever memory_format a whole model is turned to
            if not weight.is_contiguous():
                weight.data = weight.data.contiguous()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_assembled": None}

    def _actnorm(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if not self.config["actnorm"]:
            return None, None
        return self._own("actnorm_log_scale"), self._own("actnorm_bias")

    def _linear(self) -> dict[str, Tensor]:
        return {name: self._own(f"linear_{name}") for name in LINEAR_TENSORS[self.config["linear"]]}

    def _mlp(self) -> tuple[list[Tensor], list[Tensor]]:
        # Iterating over a ParameterList builds every name anew, which shows at B = 1, as does nn.Module's way to the list.
        modules: dict[str, Any] = self._modules
        weights = self._each(modules["mlp_weights"])
        biases = self._each(modules["mlp_biases"])
        if self._holds:
            weights = [self._effective(f"mlp_weights_{i}", weight) for i, weight in enumerate(weights)]
            biases = [self._effective(f"mlp_biases_{i}", bias) for i, bias in enumerate(biases)]
        return weights, biases

    def _each(self, parameters: nn.ParameterList) -> list[Tensor]:
        own: dict[str, Tensor] = parameters._parameters  # type: ignore[assignment]
        if tuple(own) == self._layer_names:
            return list(own.values())
        return [parameters[i] for i in range(len(self._layer_names))]  # pruned or parametrized

    def _own(self, name: str) -> Tensor:
        """A parameter or buffer, held entries at their values. nn.Module's own way to it takes 0.6 µs, seven times a call."""
        tensor: Tensor | None = self._parameters.get(name)
        if tensor is None:
            tensor = self._buffers.get(name)
        if tensor is None:  # parametrized, or sharded
            tensor = getattr(self, name)
        return self._effective(name, tensor) if self._holds else tensor

    # -- held entries --------------------------------------------------------------------------------------------------

    def hold(self, parameter: str, trained: Tensor) -> None:
        """Hold the entries of a stacked parameter where `trained` (its shape, bool) is False at their present values.

        Held entries get no gradient, and whatever an optimizer does to them (weight decay) changes nothing. So steps
        of different widths, with frozen parts or with two networks side by side are stacked into one flow. The values
        held are buffers: they are saved, copied, and loaded into a flow that holds nothing yet.

        Args:
            parameter: its name in `named_parameters()`, such as "mlp_weights.0" or "linear_upper".
        """
        tensor = self.get_parameter(parameter)
        if trained.shape != tensor.shape or trained.dtype != torch.bool:
            raise ValueError(
                f"trained must be a bool tensor of {parameter}'s shape {tuple(tensor.shape)}; "
                f"got {trained.dtype} {tuple(trained.shape)}"
            )
        self.held[parameter.replace(".", "_")] = _Held(tensor.detach().clone(), trained.to(tensor.device))
        self._holds = True

    def _effective(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter with its held entries at their values."""
        held = self.held._modules.get(name)
        return parameter if held is None else held(parameter)

    # -- data-dependent start ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self, x: Tensor, context: Tensor | None) -> None:
        """Give every ActNorm its start, step by step: each one sees what the steps before it make of x."""
        x = check_state("x", x, self.mlp_weights[0])
        weights, biases = self._mlp()
        for k in range(self.config["steps"]):
            log_scale, bias = data_dependent_start(x)
            done = self.actnorm_initialized[k]
            self.actnorm_log_scale[k] = torch.where(done, self.actnorm_log_scale[k], log_scale)
            self.actnorm_bias[k] = torch.where(done, self.actnorm_bias[k], bias)
            A, _, c, _ = self._affine(x.dtype, need_inverse=False)
            step = slice(k, k + 1)
            x, _ = ops.coupling_flow(
                x, A[step], c[step], [w[step] for w in weights], [b[step] for b in biases], context, **self._options
            )
        self.actnorm_initialized.fill_(True)
        self._started = True

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        # `held` is not in the config: a flow that is rebuilt from its config learns what is held from the values saved.
        for name, parameter in self.named_parameters():
            saved = f"{prefix}held.{name.replace('.', '_')}.trained"
            if saved in state_dict:
                self.hold(name, torch.ones_like(parameter, dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._started = not self.config["actnorm"] or bool(self.actnorm_initialized.all())

    # -- stacked parameters ⇄ layers -----------------------------------------------------------------------------------

    def _stack(self, layers: Sequence[nn.Module]) -> None:
        """Take over the layers' parameters and buffers, stacked over the steps."""
        actnorms = [layer for layer in layers if isinstance(layer, ActNorm)]
        linears = [layer for layer in layers if isinstance(layer, InvertibleLinear)]
        networks = [_linears(layer) for layer in layers if isinstance(layer, AffineCoupling)]
        with torch.no_grad():
            if actnorms:
                self.actnorm_log_scale = nn.Parameter(torch.stack([a.log_scale for a in actnorms]))
                self.actnorm_bias = nn.Parameter(torch.stack([a.bias for a in actnorms]))
                self.register_buffer("actnorm_initialized", torch.stack([a.initialized for a in actnorms]))
            # The same as a Python bool: reading the buffer would synchronise with the GPU at every step.
            self._started = not actnorms or bool(self.actnorm_initialized.all())
            for name in LINEAR_TENSORS[self.config["linear"]]:
                tensors = [getattr(linear, name) for linear in linears]
                stacked = torch.stack(list(tensors))
                if isinstance(tensors[0], nn.Parameter):
                    self.register_parameter(f"linear_{name}", nn.Parameter(stacked))
                else:
                    self.register_buffer(f"linear_{name}", stacked)
            # nn.Linear keeps (out, in); stacked weights are (K, in, out), multiplied from the right like A, or (K, 2, in, out).
            self.mlp_weights, self.mlp_biases = nn.ParameterList(), nn.ParameterList()
            self._layer_names = tuple(str(i) for i in range(len(networks[0])))
            for linears_of_steps in zip(*networks, strict=True):
                weight = torch.stack([torch.stack([linear.weight.T for linear in step]) for step in linears_of_steps])
                bias = torch.stack([torch.stack([linear.bias for linear in step]) for step in linears_of_steps])
                separate = self.config["coupling"] == "separate"
                self.mlp_weights.append(weight if separate else weight[:, 0].contiguous())
                self.mlp_biases.append(bias if separate else bias[:, 0].contiguous())

    @classmethod
    def from_layers(cls, flow: SequentialFlow) -> CouplingFlow:
        """Stack a flow of K equal steps ([ActNorm,] InvertibleLinear, AffineCoupling with an MLP); values are copied.

        Raises ValueError that names the first layer that breaks the pattern.
        """
        layers = list(flow.layers)
        if not layers:
            raise ValueError("the flow has no layers to stack")
        step = 3 if isinstance(layers[0], ActNorm) else 2
        if len(layers) % step:
            raise ValueError(f"{len(layers)} layers cannot be split into equal steps of {step}")
        configs = [_read_step(layers[i : i + step], i, flow.context_dim) for i in range(0, len(layers), step)]
        for k, config in enumerate(configs):
            for name, value in config.items():
                if value != configs[0][name]:
                    raise ValueError(
                        f"step {k} has {name}={value!r} but step 0 has {configs[0][name]!r}: steps must be equal"
                    )
        stacked = cls(steps=len(configs), **configs[0])
        stacked._stack(layers)
        return stacked.train(flow.training)

    def to_layers(self) -> SequentialFlow:
        """The same flow layer by layer, with copies of the values: for surgery, reading, or mixing with other layers.

        Held entries come with their values, as ordinary parameters.
        """
        layers: list[nn.Module] = []
        for k in range(self.config["steps"]):
            step = nn.ModuleList(_new_step(self.config)).to(self.mlp_weights[0])
            *actnorm, linear, coupling = step
            if actnorm:
                names = ("log_scale", "bias", "initialized")
                values = {name: self._effective(f"actnorm_{name}", getattr(self, f"actnorm_{name}")) for name in names}
                actnorm[0].load_state_dict({name: value[k] for name, value in values.items()})
            tensors = {name: tensor[k] for name, tensor in self._linear().items()}
            linear.load_state_dict(tensors)
            weights, biases = self._mlp()
            with torch.no_grad():
                for i, linears in enumerate(_linears(coupling)):
                    for j, layer in enumerate(linears):
                        network = (k, j) if self.config["coupling"] == "separate" else k
                        layer.weight.copy_(weights[i][network].T)
                        layer.bias.copy_(biases[i][network])
            layers += step
        return SequentialFlow(layers, self.event_shape, self.context_dim).train(self.training)

    def extra_repr(self) -> str:
        """Shown by repr: the constructor's arguments."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())


class _Held(nn.Module):
    """Which entries of a parameter are trained, and the values of the others."""

    value: Tensor
    trained: Tensor

    def __init__(self, value: Tensor, trained: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.register_buffer("trained", trained)

    def forward(self, parameter: Tensor) -> Tensor:
        return torch.where(self.trained, parameter, self.value)


def _new_step(config: dict[str, Any]) -> list[nn.Module]:
    """The layers of one fresh step: [ActNorm,] InvertibleLinear, AffineCoupling."""
    dim, kind = config["dim"], config["coupling"]

    def mlp() -> MLP:
        n_in, n_out = dim - dim // 2 + config["context_dim"], (2 if kind == "affine" else 1) * (dim // 2)
        return MLP(n_in, config["hidden"], n_out, activation=config["activation"])

    conditioner = SeparateNetworks(mlp(), mlp()) if kind == "separate" else mlp()
    options = {name: config[name] for name in ("log_scale", "log_scale_constant", "add_first")}
    coupling = AffineCoupling(dim, conditioner, additive=kind == "additive", **options)
    actnorm = [ActNorm(dim)] if config["actnorm"] else []
    return [*actnorm, InvertibleLinear(dim, linear=config["linear"]), coupling]


def _read_step(step: Sequence[nn.Module], position: int, context_dim: int) -> dict[str, Any]:
    """The constructor's arguments of which this step could be made; raises ValueError at the first layer that cannot."""
    kinds = (InvertibleLinear, AffineCoupling) if len(step) == 2 else (ActNorm, InvertibleLinear, AffineCoupling)
    for i, (layer, kind) in enumerate(zip(step, kinds, strict=True)):
        if not isinstance(layer, kind):
            raise ValueError(
                f"layer {position + i} is {type(layer).__name__}; a CouplingFlow has {kind.__name__} there"
            )
    linear, coupling = step[-2], step[-1]
    assert isinstance(linear, InvertibleLinear) and isinstance(coupling, AffineCoupling)
    networks = _networks(coupling)
    divides = {"flip": coupling.flip, "undo": coupling.undo, "mask": coupling.mask != "channels"}
    if any(divides.values()) or not networks:
        option = next((f"{name}={getattr(coupling, name)}" for name, is_set in divides.items() if is_set), None)
        what = f"has {option}" if option else f"has a {type(coupling.conditioner).__name__} as conditioner"
        raise ValueError(
            f"layer {position + len(step) - 1} {what}; a CouplingFlow's couplings are unflipped, with an MLP or two equal ones"
        )
    return {
        "dim": coupling.dim,
        "hidden": tuple(layer.out_features for layer in networks[0].linears()[:-1]),
        "context_dim": context_dim,
        "coupling": "additive" if coupling.additive else "separate" if len(networks) == 2 else "affine",
        "activation": networks[0].activation,
        "log_scale": coupling.log_scale,
        "log_scale_constant": coupling.log_scale_constant,
        "add_first": coupling.add_first,
        "linear": linear.linear,
        "actnorm": len(step) == 3,
    }


def _networks(coupling: AffineCoupling) -> list[MLP]:
    """The MLPs of its conditioner, one or two equal ones; none if it is something else."""
    conditioner = coupling.conditioner
    if not isinstance(conditioner, SeparateNetworks):
        return [conditioner] if isinstance(conditioner, MLP) else []
    u, t = conditioner.u, conditioner.t
    if coupling.additive or not (isinstance(u, MLP) and isinstance(t, MLP)) or str(u) != str(t) or u is t:
        return []
    return [u, t]


def _linears(coupling: nn.Module) -> list[tuple[nn.Linear, ...]]:
    """The linear layers of its networks side by side, first to last."""
    assert isinstance(coupling, AffineCoupling)
    return list(zip(*(network.linears() for network in _networks(coupling)), strict=True))
