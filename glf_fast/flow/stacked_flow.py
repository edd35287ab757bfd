"""Base class of flows of equal steps: stacked parameters, affine maps between the steps, and the start of ActNorms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from glf_fast.flow.actnorm import data_dependent_start, set_by_another_process
from glf_fast.flow.assembled import AssembledMaps
from glf_fast.flow.base import Flow
from glf_fast.flow.frozen import FixedFactor, FrozenEntries
from glf_fast.flow.indices import Indices
from glf_fast.flow.linear import LINEAR_TENSORS
from glf_fast.flow.moments import active_processes, refuse_shards
from glf_fast.flow.stacking import Stacked
from glf_fast.ops.checks import check_integer, check_shape, check_state, check_tensors

__all__ = ["StackedFlow"]

# The names under which a flow stores what its maps are made of, by the kind of linear layer, with and without ActNorms.
ACTNORM = ("actnorm_log_scale", "actnorm_bias")
STORED = {
    (linear, actnorm): tuple(f"linear_{name}" for name in names) + ACTNORM * actnorm
    for linear, names in LINEAR_TENSORS.items()
    for actnorm in (False, True)
}

F = TypeVar("F", bound="StackedFlow")


class StackedFlow(Flow):
    """K steps of ActNorm, invertible linear layer and a transform by networks, on vectors (B, D).

    Every parameter is stored stacked, (K, …), so that one kernel can walk all steps and the optimizer sees few tensors.

    Args:
        config: the constructor's arguments, among them dim, steps, hidden, context_dim, linear and actnorm.
        linear: the kind of linear layer, in LINEAR_TENSORS.
    """

    actnorm_log_scale: Tensor
    actnorm_bias: Tensor
    actnorm_initialized: Tensor
    mlp_weights: nn.ParameterList
    mlp_biases: nn.ParameterList

    def __init__(self, config: dict[str, Any], linear: str) -> None:
        for name, least in (("dim", 1), ("steps", 1), ("context_dim", 0)):
            check_integer(name, config[name], least)
        super().__init__((config["dim"],), config["context_dim"])
        if not isinstance(config["hidden"], Sequence):
            raise TypeError(f"hidden must be a sequence of widths, such as (64, 64); got {config['hidden']!r}")
        for i, width in enumerate(config["hidden"]):
            check_integer(f"hidden[{i}]", width, 0)
        self.config = config
        self._linear = linear
        self._maps = AssembledMaps()
        self.held = nn.ModuleDict()  # FrozenEntries by parameter, filled by `hold`
        self.factors = nn.ModuleDict()  # FixedFactor by parameter, filled by `multiply`
        self._adjusts = False  # whether one of the two has an entry, which takes longer to ask than a small MLP to run

    def _run_step(
        self, k: int, x: Tensor, A: Tensor, c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor],
        context: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """x (B, D) behind step k alone, with its maps A (1, D, D) and c (1, D) and the networks of all steps."""
        raise NotImplementedError

    # -- what a call begins with ---------------------------------------------------------------------------------------

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
        return self._maps.get(self._linear, linear, actnorm, dtype, need_inverse=need_inverse, training=self.training)

    def _only_scales(self) -> bool:
        """Whether the linear layers are fixed: of their maps only the ActNorms' scales are trained then."""
        weight = self._parameters.get("linear_weight")
        return self._linear == "permutation" or (weight is not None and not weight.requires_grad)

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
        for name in STORED[self._linear, config["actnorm"]]:
            # nn.Module's own way to a tensor takes 0.6 µs, seven times a call.
            tensor: Tensor | None = parameters.get(name)
            if tensor is None:
                tensor = buffers.get(name)
            if tensor is None:  # parametrized, or sharded
                tensor = getattr(self, name)
            found.append(self._effective(name, tensor) if self._adjusts else tensor)
        actnorm = (found[-2], found[-1]) if config["actnorm"] else (None, None)
        return dict(zip(LINEAR_TENSORS[self._linear], found, strict=False)), actnorm

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

    def _apply(self: F, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> F:
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
    def _start(self, x: Tensor, context: Tensor | None, members: int = 1) -> None:
        """Give every ActNorm its start, step by step: each one sees what the steps before it make of x.

        Args:
            members: flows that are stacked here, the steps of one after those of another; so are their rows in x and context.
        """
        check_shape("x", x, (None, self.config["dim"]), "(batch, dim)")
        x = check_state("x", x, self.mlp_weights[0])
        refuse_shards(self)
        if set_by_another_process(self.actnorm_initialized, self.actnorm_log_scale, self.actnorm_bias):
            self._started = True
            return
        rows, steps = (members, len(x) // members), self.config["steps"] // members
        contexts = [None] * members if context is None else context.unflatten(0, rows)
        for e, (own, given) in enumerate(zip(x.unflatten(0, rows), contexts, strict=True)):
            if not self._start_steps(range(e * steps, (e + 1) * steps), own, given):
                return
        self.actnorm_initialized.fill_(1)
        self._started = True

    def _start_steps(self, steps: range, x: Tensor, context: Tensor | None) -> bool:
        """Start the ActNorms of a flow that has these steps; False if x has no moments to start from."""
        weights, biases = self._mlp()
        for k in steps:
            found = data_dependent_start(x)
            if found is None:
                return False
            # Of a layer that came with its start, or in an averaged copy of a flow.
            done = self.actnorm_initialized[k] > 0
            for parameter, value in zip((self.actnorm_log_scale, self.actnorm_bias), found, strict=True):
                parameter[k] = torch.where(done, parameter[k], value)
            A, _, c, _ = self._affine(x.dtype, need_inverse=False)
            x = self._run_step(k, x, A[k : k + 1], c[k : k + 1], weights, biases, context)
        return True

    def train(self: F, mode: bool = True) -> F:
        """Set the mode. Averaged permutations are restored here, too: in compiled and exported calls they cannot be."""
        super().train(mode)
        if self._indices is not None:
            self._indices.check(self.get_buffer("linear_permutation"), self._buffers.get("linear_sign"))
        return self

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

    def _hold_stacked(self, values: Stacked) -> None:
        """Take over stacked tensors as parameters and buffers."""
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

    def extra_repr(self) -> str:
        """Shown by repr: the constructor's arguments, degrees abbreviated."""
        shown = {name: repr(value) for name, value in self.config.items()}
        return ", ".join(f"{name}={text if len(text) <= 200 else f'{text[:20]}…'}" for name, text in shown.items())


def _all_set(flags: Tensor) -> bool:
    """Whether all flags are set; on "meta" there are none yet, and a state that is loaded later brings them."""
    return flags.device.type != "meta" and bool(flags.all())
