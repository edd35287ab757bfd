"""The masked autoregressive flow: K steps of ActNorm → InvertibleLinear → autoregressive transform, with stacked parameters."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.actnorm import ActNorm
from glf_fast.flow.linear import LINEAR_TENSORS, InvertibleLinear
from glf_fast.flow.spline_coupling import spline_of
from glf_fast.flow.stacked_flow import StackedFlow
from glf_fast.flow.stacking import Stacked, stacked_maps
from glf_fast.ops.backends import ordinary
from glf_fast.ops.checks import check_activation, check_alike, check_choice, check_floating, check_log_scale
from glf_fast.reference import ACTIVATIONS, LOG_SCALES, MASKED_NETWORKS, TRANSFORMS, Spline, activation_of, fan_in

__all__ = ["AutoregressiveFlow"]

LINEAR = ("reverse", *LINEAR_TENSORS)
# The degrees of one step: of the features, and of the units of each hidden layer.
Degrees = Sequence[Sequence[int]]


class AutoregressiveFlow(StackedFlow):
    """K steps of ActNorm, invertible linear layer and autoregressive transform on vectors (B, D).

    Masked Autoregressive Flow (Papamakarios et al., arXiv:1705.07057): feature d becomes T(x_d; θ_d), whose parameters
    a masked network, MADE (Germain et al., arXiv:1502.03509), makes of the features before it. `log_prob` takes one pass.
    Sampling takes D passes in other libraries; here the hidden units are sorted by their degree, and the kernels' `inverse`
    computes each of them once, for the arithmetic of one pass. Both directions have gradients: `Inverse` of this flow is an
    inverse autoregressive flow (Kingma et al., arXiv:1606.04934).

    Args:
        dim: D, at least 1.
        steps: K.
        hidden: widths of the hidden layers of each step's network: 0 to 8 of an "mlp"; of the others the width of each of 1 to
            5 blocks, all equal.
        context_dim: columns of the context that conditions every step; 0 for none.
        transform: "affine", x·e^f(u) + t, or "spline", a rational-quadratic spline (arXiv:1906.04032), to which log-scales
            mean nothing.
        network: "mlp", or Linear, blocks of two masked layers, Linear: "residual" as in nflows, or "skip" as in zuko, see
            `glf_fast.reference.made`.
        spline: bins, box and the rest of those splines, a `glf_fast.Spline`, or the same as a mapping.
        activation: of the hidden layers: relu, leaky_relu, silu, gelu, tanh, elu, selu, hardswish, softplus or mish.
        activation_constant: the slope of leaky_relu below 0, or α of elu; None is PyTorch's default.
        log_scale, log_scale_constant: how the log-scale is bounded, see `glf_fast.reference.log_scale`; sbi and nflows have
            "softplus".
        context_layer: the context has a hidden layer of its own, which is added to the first one, as in nflows; else it enters
            the first layer beside the features, as in zuko.
        linear: "reverse", which reverses the features between the steps, or "plu", "dense" or "permutation", see
            `InvertibleLinear`, before every step.
        actnorm: with an ActNorm in each step; its start is set by the first training batch.
        degrees: for each step the sorted degrees of the features and of the units of each hidden layer. A hidden unit sees what
            has at most its degree, a feature's parameters the units of a lesser one. None: features 1 … D, and units of
            1 … D − 1 in equal numbers. Other orders of the features are permutations between the steps, random degrees are
            sorted by a permutation of the units, and masks that no degrees give are frozen zeros (`hold`).

    Example:
        >>> flow = AutoregressiveFlow(dim=5, steps=3, hidden=(50, 50), context_dim=2)
        >>> z, logdet = flow(torch.randn(10, 5), torch.randn(10, 2))
        >>> flow.log_prob(torch.randn(10, 5), torch.zeros(2)).shape, flow.sample(3, torch.zeros(2)).shape
        (torch.Size([10]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        dim: int,
        steps: int = 5,
        hidden: Sequence[int] = (50, 50),
        context_dim: int = 0,
        *,
        transform: str = "affine",
        network: str = "mlp",
        spline: Spline | Mapping[str, Any] | None = None,
        activation: str = "tanh",
        activation_constant: float | None = None,
        log_scale: str = "tanh",
        log_scale_constant: float | None = None,
        context_layer: bool = False,
        linear: str = "reverse",
        actnorm: bool = False,
        degrees: Sequence[Degrees] | None = None,
    ) -> None:
        check_choice("transform", transform, TRANSFORMS)
        check_choice("network", network, MASKED_NETWORKS)
        check_activation(activation, activation_constant)
        check_choice("linear", linear, LINEAR)
        check_log_scale(log_scale, log_scale_constant)
        if spline is not None and transform != "spline":
            raise ValueError(f'spline is for transform="spline"; got {spline!r} with transform={transform!r}')
        if context_layer and not context_dim:
            raise ValueError("context_layer=True is for a flow with a context; got context_dim=0")
        kind = spline_of(spline) if transform == "spline" else None
        config: dict[str, Any] = {
            "dim": dim,
            "steps": steps,
            "hidden": tuple(hidden) if isinstance(hidden, Sequence) else hidden,
            "context_dim": context_dim,
            "transform": transform,
            "network": network,
            "spline": kind and kind._asdict(),
            "activation": activation,
            "activation_constant": ACTIVATIONS[activation] if activation_constant is None else activation_constant,
            "log_scale": log_scale,
            "log_scale_constant": LOG_SCALES[log_scale] if log_scale_constant is None else log_scale_constant,
            "context_layer": context_layer,
            "linear": linear,
            "actnorm": actnorm,
            "degrees": None if degrees is None else _whole(degrees),
        }
        super().__init__(config, "permutation" if linear == "reverse" else linear)
        if dim < 1:
            raise ValueError(f"dim must be ≥ 1; got {dim}")
        names = ("transform", "network", "activation", "activation_constant", "log_scale", "log_scale_constant")
        self._options = {name: config[name] for name in (*names, "context_layer")} | {"spline": kind}
        widths = _widths(config)
        seen = [fan_in(hidden, features) for features, *hidden in _degrees(config, widths)]
        self._fan_in = {torch.device("cpu"): torch.tensor(seen, device="cpu")}  # by device
        actnorms = [ActNorm(dim) for _ in range(steps if actnorm else 0)]
        layers = [*actnorms, *(_linear_layer(linear, dim, k) for k in range(steps))]
        networks = [_linears(config, widths) for _ in range(steps)]
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        with torch.no_grad():
            for of_depth in zip(*networks, strict=True):
                weights.append(torch.stack([layer.weight.T for layer in of_depth]))
                biases.append(torch.stack([layer.bias for layer in of_depth]))
        self._hold_stacked(Stacked(*stacked_maps(layers, self._linear), weights, biases))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, D) → z (B, D), logdet (B,)."""
        context = self._begin(x, context)
        weights, biases = self._mlp()
        A, _, c, logabsdet = self._affine(weights[0].dtype, need_inverse=False)
        z, logdet = ops.autoregressive_flow(x, A, c, weights, biases, self.seen(A), context, **self._options)
        return z, logdet + logabsdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, D) → x (B, D), logdet (B,). In the kernels at the cost of one pass."""
        one = context
        if context is not None or self.context_shape:
            context = self._context("z", z, context)
        weights, biases = self._mlp()
        _, A_inv, c, logabsdet = self._affine(weights[0].dtype, need_inverse=True)
        assert A_inv is not None
        options = self._options
        if one is not None and one.ndim == 1 and len(z) >= 64 and _ordinary_inference(z):
            check_floating("context", one)
            check_alike([("context", one)], z)
            weights, biases = self._conditioned(one, weights, biases)
            context, options = None, options | {"context_layer": False}
        x, logdet = ops.autoregressive_flow_inverse(z, A_inv, c, weights, biases, self.seen(c), context, **options)
        return x, logdet - logabsdet

    def _conditioned(
        self, context: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The networks given one context (C,) for all rows: what it adds to a layer is a bias.

        With 16 columns of context, 10 features and 50 hidden units that is a fifth of all products.
        """
        weights, biases, context = list(weights), list(biases), context.to(biases[0].dtype)
        if self.config["context_layer"]:
            own = context @ weights.pop() + biases.pop()
            biases[0] = biases[0] + activation_of(self.config["activation"], self.config.get("activation_constant"))(
                own
            )
        n_in = self.config["dim"]
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if rows := weight.shape[1] - n_in:
                weights[i], biases[i] = weight[:, rows:].contiguous(), bias + context @ weight[:, :rows]
            n_in = weight.shape[2]
        return weights, biases

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) = log N(z; 0, I) + logdet in nats, (B,)."""
        context = self._begin(x, context)
        weights, biases = self._mlp()
        A, _, c, logabsdet = self._affine(weights[0].dtype, need_inverse=False)
        return ops.autoregressive_flow_log_prob(
            x, A, c, logabsdet, weights, biases, self.seen(A), context, **self._options
        )

    def _run_step(
        self, k: int, x: Tensor, A: Tensor, c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor],
        context: Tensor | None,
    ) -> Tensor:  # fmt: skip
        step = slice(k, k + 1)
        return ops.autoregressive_flow(
            x,
            A,
            c,
            [w[step] for w in weights],
            [b[step] for b in biases],
            self.seen(A)[step],
            context,
            **self._options,
        )[0]

    def seen(self, like: Tensor) -> Tensor:
        """How many units each unit sees (K, …): integers that no tool must average, and so no buffer."""
        found = self._fan_in.get(like.device)
        if found is None:
            found = self._fan_in[torch.device("cpu")].to(like.device)
            if ordinary():
                self._fan_in[like.device] = found
        return found

    def get_extra_state(self) -> Tensor:
        """How many units each unit sees (K, …), in float32: averages of states of one flow change it by rounding alone."""
        return self.seen(self.mlp_biases[0]).float()

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` returned: the degrees of another flow, which may be random, belong to its weights.

        Raises:
            ValueError: averages of flows with different degrees.
        """
        own = self._fan_in[torch.device("cpu")]
        if state.device.type == "meta" or state.shape != own.shape:  # other shapes are those of other weights, too
            return
        given = state.detach().to("cpu", torch.float64)
        found = given.round()
        if not torch.allclose(given, found, rtol=1e-3, atol=1e-3):
            raise ValueError(
                "the saved degrees are not whole numbers: average the states of one flow, not of flows with different masks"
            )
        if not torch.equal(found, own.double()):
            self._fan_in = {torch.device("cpu"): found.long()}

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if (name := f"{prefix}_extra_state") in missing:  # saved before degrees were; the constructor's are kept
            missing.remove(name)

    def __getstate__(self) -> dict[str, Any]:
        cpu = torch.device("cpu")
        return {**super().__getstate__(), "_fan_in": {cpu: self._fan_in[cpu]}}


def _ordinary_inference(z: Tensor) -> bool:
    """Whether a call has no gradients, and products of full precision."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled(z.device.type) or torch.compiler.is_compiling())


def _linear_layer(linear: str, dim: int, k: int) -> InvertibleLinear:
    """The linear layer of step k: of "reverse", the identity for the first."""
    if linear == "reverse":
        return InvertibleLinear(dim, linear="permutation", permutation=range(dim)[:: -1 if k else 1])
    return InvertibleLinear(dim, linear=linear)


def _whole(degrees: Sequence[Degrees]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Degrees as tuples; raises TypeError for anything else than whole numbers in sequences in sequences."""
    try:
        return tuple(tuple(tuple(map(operator.index, layer)) for layer in step) for step in degrees)
    except TypeError:
        raise TypeError(
            "degrees must be whole numbers: for each step, one for each feature, then one for each unit of each hidden layer; "
            f"got {reprlib.repr(degrees)}"
        ) from None


def _widths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Units of each hidden layer: of residual blocks, of the stream before them and of their two layers.

    Raises:
        ValueError: widths that a network of this kind cannot have.
    """
    hidden, mlp = config["hidden"], config["network"] == "mlp"
    least, most = (0, 8) if mlp else (1, 5)
    if not least <= len(hidden) <= most or any(width < 1 for width in hidden):
        raise ValueError(f"hidden must be {least} to {most} widths ≥ 1; got {hidden}")
    if config["context_layer"] and not hidden:
        raise ValueError("context_layer=True is for a network with hidden layers; got hidden=()")
    if mlp:
        return tuple(hidden)
    if len(set(hidden)) > 1:
        raise ValueError(f"the blocks of a residual network must have one width; got hidden={hidden}")
    return hidden[:1] * (1 + 2 * len(hidden))


def _degrees(config: Mapping[str, Any], widths: Sequence[int]) -> Sequence[Degrees]:
    """The degrees of all steps.

    Raises:
        ValueError: they do not fit the widths, are not sorted, or shrink along a residual network's stream.
    """
    dim, steps = config["dim"], config["steps"]
    if config["degrees"] is None:
        # In equal numbers, as nflows and pyro have them. A flow of one feature has nothing to see.
        hidden = [sorted(i % max(1, dim - 1) + min(1, dim - 1) for i in range(width)) for width in widths]
        return [[range(1, dim + 1), *hidden]] * steps
    given = config["degrees"]
    wanted = [dim, *widths]
    if len(given) != steps or any([len(layer) for layer in step] != wanted for step in given):
        raise ValueError(f"degrees must be, for each of {steps} steps, {wanted} degrees of features and hidden units")
    for step in given:
        if any(list(layer) != sorted(layer) for layer in step):
            raise ValueError("degrees must be sorted within each layer: permute the units of the layer")
        if config["network"] != "mlp" and any(
            new < old for i in range(1, len(step) - 2, 2) for old, new in zip(step[i], step[i + 2], strict=True)
        ):
            raise ValueError("degrees of a residual network's stream must not shrink from block to block")
    return given


def _linears(config: Mapping[str, Any], widths: Sequence[int]) -> list[nn.Linear]:
    """Fresh linear layers of one step's network, in the order of `mlp_weights`; the last but the context's starts at zero.

    With softplus a log-scale starts at 0, too: five steps of softplus(0) would begin with a sixth of every feature's size,
    which costs 0.8 to 1.2 nats after 20 epochs of sbi's training with 2,000 simulations of five parameters.
    """
    dim, context_dim, network = config["dim"], config["context_dim"], config["network"]
    columns = Spline(**config["spline"]).columns if config["spline"] else TRANSFORMS[config["transform"]]
    sizes = [dim, *widths, columns * dim]
    layers = []
    for i in range(len(sizes) - 1):
        in_block = network == "residual" and i % 2 == 1 and i + 2 < len(sizes)
        enters = in_block if i else not config["context_layer"]
        layers.append(nn.Linear(sizes[i] + context_dim * enters, sizes[i + 1]))
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    least = config["log_scale_constant"]
    if config["transform"] == "affine" and config["log_scale"] == "softplus" and least < 1:
        nn.init.constant_(layers[-1].bias[0::2], math.log(math.expm1(1 - least)))
    return [*layers, nn.Linear(context_dim, widths[0])] if config["context_layer"] else layers
