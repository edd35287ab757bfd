"""Reads zuko's flows. Its transforms are data → noise; `flow(context)` builds a distribution anew at every call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.gaps import inverted_layers
from glf_fast.conversion.layers import Coupling, Dense, Diagonal, Layer, Permutation, Unfusable
from glf_fast.conversion.mlp import read_mlp, select_outputs
from glf_fast.conversion.reading import ConversionError, Reading, read_each, trained_together
from glf_fast.reference import log_scale

__all__ = ["KeptTransform", "read", "read_transform", "transforms"]


class KeptTransform(nn.Module):
    """A lazy transform as it is, as a layer: one evaluation for output and logdet."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: output (B, D), logdet (B,)."""
        return self._apply_transform(self.transform(context), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: output (B, D), logdet (B,)."""
        return self._apply_transform(self.transform(context).inv, z)

    @staticmethod
    def _apply_transform(transform: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = transform.call_and_ladj(x)
        return y, ladj.sum(1) if ladj.ndim == 2 else ladj  # per column for elementwise transforms


def read(flow: Any, device: str = "cpu") -> Reading:
    """A `zuko.lazy.Flow` whose base is a diagonal normal."""
    try:
        base = flow.base(None)
    except Exception as error:  # a network that makes a distribution of the context
        raise ConversionError("its base depends on the context: N(0, I) or a diagonal normal is covered") from error
    normal = getattr(base, "base_dist", None)
    if type(base).__name__ not in ("DiagNormal", "Independent") or type(normal) is not torch.distributions.Normal:
        raise ConversionError(f"base distribution {type(base).__name__}: DiagNormal is covered")
    if len(base.event_shape) != 1 or base.batch_shape:
        shapes = f"batch shape {tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}"
        raise ConversionError(f"a base of {shapes}: flows on vectors are covered")
    dim = base.event_shape[0]
    layers = read_each(transforms(flow.transform), lambda t: read_transform(t, dim), KeptTransform, device)
    if normal.loc.any() or (normal.scale != 1).any() or normal.loc.requires_grad or normal.scale.requires_grad:
        try:
            trained = trained_together(normal.loc, normal.scale)
        except Unfusable as reason:
            raise ConversionError(f"base distribution: {reason}") from None
        layers.append(Diagonal(-normal.scale.log(), -normal.loc / normal.scale, trained))
    columns = max(_context_columns(module, dim) for module in flow.modules())

    def inverse(z: Tensor, context: Tensor | None) -> Tensor:
        return flow.transform(context).inv(normal.loc + z * normal.scale)

    return Reading(
        layers=layers,
        event_shape=(dim,),
        log_prob=lambda x, context: flow(context).log_prob(x),
        inverse=inverse,
        context_shape=(columns,) if columns else (),
    )


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


def transforms(transform: nn.Module, name: str = "transform") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the lazy transforms, one by one, in nested compositions too."""
    if type(transform).__name__ == "LazyComposedTransform":
        for i, part in enumerate(transform.transforms):  # type: ignore[arg-type]
            yield from transforms(part, f"{name}.transforms.{i}")
    else:
        yield name, transform


def read_transform(transform: nn.Module, dim: int) -> list[Layer]:
    """The layers of one lazy transform on vectors of `dim` columns; raises Unfusable."""
    kind = type(transform).__name__
    if kind == "GeneralCouplingTransform":
        return [_coupling(transform)]
    if kind == "LazyInverse":
        inner = [layer for _, part in transforms(transform.transform) for layer in read_transform(part, dim)]  # type: ignore
        return inverted_layers(inner)
    if kind == "UnconditionalTransform":
        eager = transform()
        reader = _UNCONDITIONAL.get(type(eager).__name__)
        if reader is None:
            raise Unfusable(f"{type(eager).__name__} is neither linear nor a permutation")
        return [reader(eager, dim, trained_together(*transform.parameters()))]
    raise Unfusable(f"{kind} is not a coupling with an affine transformation, a linear layer or a permutation")


def _coupling(transform: Any) -> Coupling:
    passive, transformed = transform.mask.nonzero().squeeze(1), (~transform.mask).nonzero().squeeze(1)
    T = len(transformed)
    shapes = [tuple(shape) for shape in transform.shapes]
    kind = transform.univariate.func if isinstance(transform.univariate, partial) else transform.univariate
    name = getattr(kind, "__name__", repr(kind)) if getattr(kind, "__module__", "") == "zuko.transforms" else repr(kind)
    if name == "AdditiveTransform" and shapes == [()]:
        return Coupling(passive, transformed, read_mlp(transform.hyper), "exp", None, False)
    if name != "MonotonicAffineTransform" or shapes != [(), ()]:
        raise Unfusable(f"its transformation {name} is not affine")
    # ℓ → |ln slope| as a → ∞: the slope of this object, whose default differs from release to release.
    probe = torch.tensor([1e300, -40.0, -3.0, -0.1, 0.0, 0.2, 5.0, 30.0], dtype=torch.float64)
    log_scales = transform.univariate(torch.zeros_like(probe), probe).log_scale
    slope = float(f"{math.exp(-log_scales[0].item()):.12g}")  # the exponential of a logarithm is off in the last digits
    if not torch.allclose(log_scales, log_scale(probe, "softclip", slope), rtol=1e-9, atol=1e-12):
        raise Unfusable("its log-scale is not a / (1 + |a / ln slope|)")
    order = torch.cat([torch.arange(1, 2 * T, 2), torch.arange(0, 2 * T, 2)])  # zuko has [t₀, a₀, t₁, a₁, …]
    mlp = select_outputs(read_mlp(transform.hyper), order)
    return Coupling(passive, transformed, mlp, "softclip", slope, False)


def _lu(eager: Any, dim: int, trained: bool) -> Layer:
    W = (eager.L @ eager.U).T
    return Dense(W, W.new_zeros(dim), trained, regular=False)  # the diagonal of L may cross zero


def _rotation(eager: Any, dim: int, trained: bool) -> Layer:
    if trained:
        raise Unfusable("a trained matrix of ours would not stay a rotation")
    return Dense(eager.R.T, eager.R.new_zeros(dim), False, True)


def _affine(eager: Any, dim: int, trained: bool) -> Layer:
    loc, scale = (torch.as_tensor(t, dtype=torch.float64).expand(dim) for t in (eager.loc, eager.scale))
    if not (scale > 0).all():
        raise Unfusable("has negative scales")
    return Diagonal(scale.log(), loc, trained)


def _monotonic_affine(eager: Any, dim: int, trained: bool) -> Layer:
    return Diagonal(eager.log_scale.expand(dim), eager.shift.expand(dim), trained)


_UNCONDITIONAL: dict[str, Callable[[Any, int, bool], Layer]] = {
    "PermutationTransform": lambda eager, dim, trained: Permutation(eager.order),
    "LULinearTransform": _lu,
    "RotationTransform": _rotation,
    "AffineTransform": _affine,
    "MonotonicAffineTransform": _monotonic_affine,
}
