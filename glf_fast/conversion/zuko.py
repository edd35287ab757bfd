"""zuko. Its transforms are data → noise; `flow(context)` makes a distribution in every call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from glf_fast.conversion import mlp
from glf_fast.conversion.activations import named_activation, one_activation
from glf_fast.conversion.autoregressive import DeclaredAutoregressive, MaskedLinear, masked_linear
from glf_fast.conversion.chains import Chain, Part, Shape, put_transform
from glf_fast.conversion.couplings import DeclaredCoupling
from glf_fast.conversion.dropout import Dropped, lost
from glf_fast.conversion.gaps import inverted_layers
from glf_fast.conversion.layers import (
    Bijection,
    ConversionError,
    Dense,
    Diagonal,
    Layer,
    NamedActivation,
    Permutation,
    Unfusable,
    trained_together,
)
from glf_fast.conversion.library import Base, FusedLayer, Library, run_on_rows
from glf_fast.conversion.mlp import check_class
from glf_fast.flow import Flow
from glf_fast.reference import Spline, log_scale

__all__ = ["LIBRARY"]

mlp.KNOWN["zuko.nn.Linear"] = mlp.linear_step


class KeptTransform(Bijection):
    """A lazy transform as it is, as a layer: one evaluation for output and logdet."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.transform = part.module

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        transform = self.transform(context)
        y, ladj = (transform.inv if inverse else transform).call_and_ladj(x)
        return y, ladj.sum(1) if ladj.ndim == 2 else ladj  # per column for elementwise transforms


class ZukoLayer(FusedLayer):
    """A lazy transform: a context makes it a transform data → noise."""

    def forward(self, c: Tensor | None = None) -> Transform:  # type: ignore[override]
        """The transform given c (…, C)."""
        return _Given(self.flow, self._given(c))


class _Given(Transform):
    """A flow and its context as a transform of torch.distributions, data → noise, with zuko's `call_and_ladj`."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: Flow, context: Tensor | None) -> None:
        super().__init__()
        self.flow = flow
        self.context = context

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(…, D) → (…, D), log|det| (…), in one evaluation."""
        return run_on_rows(self.flow, x, self.context)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det| (…) of data → noise at x."""
        return run_on_rows(self.flow, x, self.context)[1]

    def _call(self, x: Tensor) -> Tensor:
        return run_on_rows(self.flow, x, self.context)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return run_on_rows(self.flow.inverse, y, self.context)[0]


def _context_columns(module: Any, dim: int) -> int:
    """How many columns of context a lazy transform takes, fused or not, by its network's inputs; 0 for other modules."""
    for kind in type(module).__mro__:
        if kind.__name__ == "GeneralCouplingTransform":
            return module.hyper[0].weight.shape[1] - int(module.mask.sum())
        if kind.__name__ == "MaskedAutoregressiveTransform":
            return module.hyper[0].weight.shape[1] - dim
        if kind.__name__ == "ElementWiseTransform":
            return module.hyper[0].weight.shape[1] if hasattr(module, "hyper") else 0
        if kind.__name__ == "FFJTransform":
            return module.ode[0].weight.shape[1] - dim - 2 * len(module.freqs)
    return 0


class _Univariate(NamedTuple):
    """A univariate transformation, in the words of `DeclaredCoupling`."""

    layout: str
    log_scale: str = "exp"
    constant: float | None = None
    spline: Spline | None = None


def _coupling(part: Part) -> list[Layer]:
    transform = part.module
    halves = transform.mask.nonzero().squeeze(1), (~transform.mask).nonzero().squeeze(1)
    kind = _univariate(transform)
    joined = kind.spline is not None
    return [DeclaredCoupling(*halves, transform.hyper, **kind._asdict(), joined=joined).read(part)]


def _autoregressive(part: Part) -> list[Layer]:
    """With fewer passes than features, and with adjacency matrices, several features have one degree."""
    transform = part.module
    kind = _univariate(transform)
    if kind.layout == "t":
        raise Unfusable("its transformation AdditiveTransform is covered in couplings alone")
    network, linears, activation = _masked_network(transform.hyper)
    outputs = torch.arange(len(linears[-1].weight)).view(part.shape[0], -1)
    if kind.spline is None:  # the shift comes first
        outputs = outputs.flip(1)
    declared = DeclaredAutoregressive(
        linears, outputs, activation, network, log_scale=kind.log_scale, constant=kind.constant, spline=kind.spline
    )
    return [declared.read()]


def _elementwise(part: Part) -> list[Layer]:
    """An autoregressive layer whose features all depend on the context alone, as each transform of a flow of one feature is."""
    transform, dim = part.module, part.shape[0]
    if not hasattr(transform, "hyper"):
        raise Unfusable("its transformation depends on nothing: it is as fast as it can be")
    kind = _univariate(transform)
    if kind.layout == "t":
        raise Unfusable("its transformation AdditiveTransform is covered in couplings alone")
    every = list(mlp.network_steps(transform.hyper))
    steps = [step for step in every if not isinstance(step, Dropped)]
    linears = [step for step in steps if isinstance(step, tuple)]
    activation = one_activation("its network", [step for step in steps if isinstance(step, NamedActivation)])
    if [type(step) for step in steps] != [tuple, *[NamedActivation, tuple] * (len(linears) - 1)]:
        raise Unfusable("its network is not linear layers with one kind of activation between")
    masked = [MaskedLinear(W, torch.ones_like(W, requires_grad=False), b) for W, b in linears]
    W, mask, b = masked[0]
    of_x = W.new_zeros(len(W), dim)
    masked[0] = MaskedLinear(torch.cat([of_x, W], 1), torch.cat([of_x, mask], 1), b)
    outputs = torch.arange(len(linears[-1][0])).view(dim, -1)
    if kind.spline is None:  # the shift comes first
        outputs = outputs.flip(1)
    declared = DeclaredAutoregressive(
        masked,
        outputs,
        activation,
        log_scale=kind.log_scale,
        constant=kind.constant,
        spline=kind.spline,
        lost=lost(every),
        blind=True,
    )
    return [declared.read()]


def _masked_network(mlp: Any) -> tuple[str, list[MaskedLinear], NamedActivation]:
    """Kind, linear layers and activation of a MaskedMLP: Linear, activation, … Linear, or Linear, residual blocks, Linear."""
    check_class(mlp, "MaskedMLP")
    layers = list(mlp)
    blocks = [layer for layer in layers if isinstance(layer, nn.Sequential)]
    network, between = "mlp", layers[1::2]
    if blocks:
        if blocks != layers[1:-1] or any(len(block) != 3 for block in blocks):
            raise Unfusable("its residual network has layers of several widths")
        for block in blocks:
            check_class(block, "Residual")
        network, between = "skip", [block[1] for block in blocks]
        layers = [layers[0], *(layer for block in blocks for layer in block), layers[-1]]
    linears = [layer for layer in layers if hasattr(layer, "mask")]
    activation = one_activation("its network", [named_activation(layer) for layer in between])
    if len(layers) != len(linears) + len(between):
        raise Unfusable("its network is not linear layers with one kind of activation between")
    return network, [masked_linear(layer) for layer in linears], activation


def _univariate(transform: Any) -> _Univariate:
    """Reads the univariate transformation of this object; raises Unfusable."""
    shapes = [tuple(shape) for shape in transform.shapes]
    kind = transform.univariate.func if isinstance(transform.univariate, partial) else transform.univariate
    name = kind.__name__ if isinstance(kind, type) else repr(kind)
    if name == "AdditiveTransform" and shapes == [()]:
        return _Univariate("t")
    if name == "MonotonicRQSTransform" and len(shapes) == 3:
        return _Univariate("spline", spline=_spline(transform, shapes))
    if name != "MonotonicAffineTransform" or shapes != [(), ()]:
        raise Unfusable(f"its transformation {name} is neither affine nor a rational-quadratic spline")
    # ℓ → |ln slope| as a → ∞: the slope of this object, whose default differs from release to release.
    probe = torch.tensor([1e300, -40.0, -3.0, -0.1, 0.0, 0.2, 5.0, 30.0], dtype=torch.float64)
    log_scales = transform.univariate(torch.zeros_like(probe), probe).log_scale
    slope = float(f"{math.exp(-log_scales[0].item()):.12g}")  # the exponential of a logarithm is off in the last digits
    if not torch.allclose(log_scales, log_scale(probe, "softclip", slope), rtol=1e-9, atol=1e-12):
        raise Unfusable("its log-scale is not a / (1 + |a / ln slope|)")
    return _Univariate("tutu", "softclip", slope)


def _spline(transform: Any, shapes: list[tuple[int, ...]]) -> Spline:
    """The kind of its splines, with the bound and the slope of this object, whose defaults may be anything."""
    (bins,), _, (slopes,) = shapes
    parameters = [torch.zeros(bins, dtype=torch.float64) for _ in range(2)]
    probe = transform.univariate(*parameters, torch.full((slopes,), 1e300, dtype=torch.float64))
    bound = float(f"{probe.horizontal[-1].item():.12g}")
    slope = float(f"{1 / probe.derivatives[1].item():.12g}")  # c → ∞ makes 1/slope
    return Spline(bins, -bound, bound, "linear", "zuko", min_derivative=slope)


def _lu(eager: Any, dim: int, trained: bool) -> Layer:
    W = (eager.L @ eager.U).T
    return Dense(W, W.new_zeros(dim), trained, regular=False)  # the diagonal of L may cross zero


def _rotation(eager: Any, dim: int, trained: bool) -> Layer:
    if trained:
        raise Unfusable("a trained matrix would not stay a rotation in the converted flow")
    return Dense(eager.R.T, eager.R.new_zeros(dim), trained, regular=True)


def _affine(eager: Any, dim: int, trained: bool) -> Layer:
    loc, scale = (torch.as_tensor(t, dtype=torch.float64).expand(dim) for t in (eager.loc, eager.scale))
    if not (scale > 0).all():
        raise Unfusable("has negative scales")
    return Diagonal(scale.log(), loc, trained)


_UNCONDITIONAL: dict[str, Callable[[Any, int, bool], Layer]] = {
    "PermutationTransform": lambda eager, dim, trained: Permutation(eager.order),
    "LULinearTransform": _lu,
    "RotationTransform": _rotation,
    "AffineTransform": _affine,
    "MonotonicAffineTransform": lambda eager, dim, trained: Diagonal(
        eager.log_scale.expand(dim), eager.shift.expand(dim), trained
    ),
}


def _unconditional(part: Part) -> list[Layer]:
    """Reads the transform that the part makes."""
    eager = part.module()
    kind = type(eager).__name__
    if kind not in _UNCONDITIONAL:
        raise Unfusable(f"{kind} is neither linear nor a permutation")
    return [_UNCONDITIONAL[kind](eager, part.shape[0], trained_together(*part.module.parameters()))]


def _chains(flow: Any) -> list[Chain]:
    try:
        shape = tuple(flow.base().event_shape)
    except Exception as error:  # a base that only a context makes a distribution
        raise ConversionError("its base depends on the context, and does not say how many columns it has") from error
    parts = LIBRARY.placed(list(LIBRARY.flattened(flow.transform, "transform")), shape)
    return [Chain(parts, partial(put_transform, flow, "transform", "transforms", parts))]


def _base(flow: Any) -> Base:
    try:
        base = flow.base(None)
    except Exception as error:  # a network that makes a distribution of the context
        raise ConversionError("its base depends on the context: N(0, I) or a diagonal normal is covered") from error
    normal = getattr(base, "base_dist", None)
    name = type(base).__name__
    if name not in ("DiagNormal", "Independent") or type(normal) is not torch.distributions.Normal:
        raise ConversionError(f"base distribution {name}: DiagNormal is covered")
    if len(base.event_shape) != 1 or base.batch_shape:
        shapes = f"batch shape {tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}"
        raise ConversionError(f"a base of {shapes}: flows on vectors are covered")
    return Base.normal(name, normal.loc, normal.scale.log(), normal.loc, normal.scale)


def _context_shape(parts: Sequence[Part]) -> Shape:
    """The context's columns, from the inputs of the networks of fused transforms and others."""
    columns = max((_context_columns(m, part.shape[0]) for part in parts for m in part.module.modules()), default=0)
    return (columns,) if columns else ()


LIBRARY: Library = Library(
    package="zuko",
    flows=("Flow",),
    packages=("zuko.flows", "zuko.lazy"),
    marks=("transform", "base"),
    chains=_chains,
    base=_base,
    log_prob=lambda flow, x, context: flow(context).log_prob(x),
    generate=lambda flow, noise, context: flow.transform(context).inv(noise),
    kept=KeptTransform,
    fused=lambda fused, parts: ZukoLayer(fused),
    on_vectors={
        "GeneralCouplingTransform": _coupling,
        "MaskedAutoregressiveTransform": _autoregressive,
        "ElementWiseTransform": _elementwise,
        "LazyInverse": lambda part: inverted_layers(LIBRARY.read_inside(part, part.module.transform)),
        "UnconditionalTransform": _unconditional,
    },
    compositions={"LazyComposedTransform": "transforms"},
    context_shape=_context_shape,
)
