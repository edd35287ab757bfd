"""Folding of the affine layers between two couplings into one product of the channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.actnorm import ActNorm
from glf_fast.flow.coupling import Coupling
from glf_fast.flow.fixed_linear import FixedLinear
from glf_fast.flow.hooks import has_hooks
from glf_fast.flow.linear import LINEAR_TENSORS, InvertibleLinear, assemble
from glf_fast.ops.backends import ordinary

__all__ = ["AssembledProducts", "InOrder", "Product", "Step", "assembled", "folded"]

# Matrices and offsets by place, and Σ log|det A| with places: what `assembled` returns.
_Assembled = tuple[dict[int, tuple[Tensor, Tensor]], list[tuple[int, Tensor]]]
# x A + c: A, A⁻¹ or None, c, log|det A|; of K maps each with K in front.
_Maps = tuple[Tensor, Tensor | None, Tensor, Tensor]


class Product:
    """Affine layers of one width, one after the other, with a matrix among them: together x A + c over the channels.

    Args:
        layers: first to last.
        level: counts the layers before these that may change the number of pixels.
        follows, precedes: the couplings before and behind, where their masks bring channels together: x comes in the order of
            the one, and y goes in the order of the other.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        level: int,
        follows: Coupling | None,
        precedes: Coupling | None,
    ) -> None:
        self.layers = tuple(layers)
        self.level = level
        self.follows = follows
        self.precedes = precedes
        self.dim: int = layers[0].dim

    def pattern(self) -> tuple[object, ...]:
        """The properties that products share if they are assembled together."""
        return self.level, self.dim, *map(_kind, self.layers)


class InOrder:
    """A coupling whose channels the layers before it have brought together, and those behind it put back."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling

    def __call__(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise, as `Coupling`."""
        return self.coupling.couple(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data, as `Coupling`."""
        return self.coupling.couple(z, context, inverse=True)


Step = nn.Module | Product | InOrder


def folded(layers: Iterable[nn.Module], *, inverse: bool) -> list[Step]:
    """The layers, first to last, with every run of affine ones that holds a matrix as a `Product`.

    The orders of channels for which couplings with masks ask are taken over by products before and behind. Layers with hooks
    are applied by themselves, so that the hooks run; ActNorms that are `far`, to keep the digits; and all layers in a
    forward pass that sets scales and shifts of ActNorms, whose values are not known yet.
    """
    steps: list[Step] = []
    run: list[Any] = []
    follows: Any = None  # the coupling before the run whose channels are still in the order of its mask
    level = 0

    def close(precedes: Any = None) -> None:
        nonlocal follows
        if any(_kind(layer) not in ("actnorm", "permutation") for layer in run):
            steps.append(Product(run, level, follows, precedes))
        else:
            steps.extend([] if follows is None else [follows.restore])
            steps.extend(run)
            steps.extend([] if precedes is None else [precedes.order])
        run.clear()
        follows = None

    layer: Any
    for layer in layers:
        if type(layer) is ActNorm and layer.starts_next() and not inverse:
            return list(layers)
        folds = _folds(layer)
        ordered = isinstance(layer, Coupling) and layer.order is not None and not has_hooks(layer)
        last = run[-1] if run else follows
        if last is not None and not ((folds or ordered) and last.dim == layer.dim):
            close()
        if folds:
            run.append(layer)
        elif ordered:
            close(layer)
            steps.append(InOrder(layer))
            follows = layer
        else:
            steps.append(layer)
            level += not isinstance(layer, ActNorm | InvertibleLinear | FixedLinear | Coupling)
    close()
    return steps


def _folds(layer: Any) -> bool:
    """Whether a layer may be part of a product."""
    if type(layer) not in (ActNorm, InvertibleLinear, FixedLinear):  # subclasses may do something else
        return False
    return not (has_hooks(layer) or (type(layer) is ActNorm and layer.far))


def _kind(layer: Any) -> str:
    return "actnorm" if type(layer) is ActNorm else layer.linear


class AssembledProducts:
    """`assembled`, cached for each direction while the layers' values stay the same. Copies and pickles of it are empty.

    Of sampling one image with 96 steps of 16 channels it saves 3.5 of 60 ms (one core, Zen 3).
    """

    def __init__(self) -> None:
        self._cached: dict[bool, tuple[list[Any], list[Tensor], _Assembled]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_cached": {}}

    def get(self, steps: Sequence[Step], *, inverse: bool) -> _Assembled:
        """The same as `assembled`; on a processor and without gradients, the maps of the last call where nothing changed."""
        layers = [layer for step in steps if isinstance(step, Product) for layer in step.layers]
        tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
        # On a processor only: comparing would make a GPU wait.
        if not tensors or torch.is_grad_enabled() or tensors[0].device.type != "cpu" or not ordinary():
            return assembled(steps, inverse=inverse)
        cached = self._cached.get(inverse)
        same = [
            (place, step.pattern(), *map(id, step.layers))
            for place, step in enumerate(steps)
            if isinstance(step, Product)
        ]
        if cached is None or cached[0] != same or not ops.identical(tensors, cached[1]):
            cached = same, [t.detach().clone() for t in tensors], assembled(steps, inverse=inverse)
            self._cached[inverse] = cached
        return cached[2]


def assembled(steps: Sequence[Step], *, inverse: bool) -> _Assembled:
    """A, or A⁻¹ if `inverse`, and c (C,) of each product, by its place in `steps`; and for all products of one pattern
    Σ log|det A| with the place of one of them.

    Those of one pattern are assembled together: ten operations, and ten nodes for the backward, not ten for each.
    """
    patterns: dict[tuple[object, ...], list[int]] = {}
    for place, step in enumerate(steps):
        if isinstance(step, Product):
            patterns.setdefault(step.pattern(), []).append(place)
    maps: dict[int, tuple[Tensor, Tensor]] = {}
    logabsdets: list[tuple[int, Tensor]] = []
    for places in patterns.values():
        A, A_inv, c, logabsdet = _assembled_together([steps[i] for i in places], inverse=inverse)
        matrices = A_inv if inverse else A
        assert matrices is not None
        if len(places) == 1:
            maps[places[0]] = matrices, c
        else:
            maps |= zip(places, zip(matrices.unbind(), c.unbind(), strict=True), strict=True)
            logabsdet = logabsdet.sum()
        logabsdets.append((places[0], logabsdet))
    return maps, logabsdets


def _assembled_together(products: Sequence[Any], *, inverse: bool) -> _Maps:
    """The maps of K products of one pattern; of one, without a K in front."""
    maps: _Maps | None = None
    actnorm: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)  # log-scale, bias that no matrix has taken in yet
    for layers in zip(*(product.layers for product in products), strict=True):
        kind = _kind(layers[0])
        if kind == "actnorm":
            log_scale, bias = _stacked(layers, "log_scale"), _stacked(layers, "bias")
            if actnorm[0] is not None:
                log_scale, bias = actnorm[0] + log_scale, actnorm[1] + bias * torch.exp(-actnorm[0])
            actnorm = log_scale, bias
            continue
        if kind == "permutation":
            tensors = {"permutation": _stacked(layers, "permutation")}
            linear = assemble(kind, tensors, _dtype(products[0]), *actnorm, need_inverse=inverse)
        else:
            linear = _linear(kind, layers, *actnorm, inverse=inverse)
        actnorm = (None, None)
        maps = linear if maps is None else _both(maps, linear)
    assert maps is not None
    if actnorm[0] is not None:
        maps = _scaled(maps, *actnorm)
    return _ordered(maps, [product.follows for product in products], [product.precedes for product in products])


def _dtype(product: Product) -> torch.dtype:
    """The type of the numbers in its matrices."""
    return next(t.dtype for layer in product.layers for t in layer.state_dict().values() if t.is_floating_point())


def _linear(kind: str, layers: Sequence[Any], log_scale: Tensor | None, bias: Tensor | None, *, inverse: bool) -> _Maps:
    """Linear layers of one kind, each with the ActNorm before it."""
    if kind == "fixed":
        W_inv = _stacked(layers, "weight_inverse") if inverse else None
        return ops.fold_actnorm(_stacked(layers, "weight"), W_inv, _stacked(layers, "logabsdet"), log_scale, bias)
    tensors = {name: _stacked(layers, name) for name in LINEAR_TENSORS[kind]}
    dtype = next(iter(tensors.values())).dtype
    return assemble(kind, tensors, dtype, log_scale, bias, need_inverse=inverse)


def _both(first: _Maps, second: _Maps) -> _Maps:
    """(x A₁ + c₁) A₂ + c₂."""
    A, A_inv, c, logabsdet = first
    A_next, A_next_inv, c_next, logabsdet_next = second
    with torch.autocast(A.device.type, enabled=False):  # the maps of the two directions must match
        c = (c.unsqueeze(-2) @ A_next).squeeze(-2) + c_next
        if A_inv is not None:
            assert A_next_inv is not None
            A_inv = A_next_inv @ A_inv
        return A @ A_next, A_inv, c, logabsdet + logabsdet_next


def _scaled(maps: _Maps, log_scale: Tensor, bias: Tensor) -> _Maps:
    """(x A + c + b)·e^s."""
    A, A_inv, c, logabsdet = maps
    scale = torch.exp(log_scale)
    A_inv = None if A_inv is None else torch.exp(-log_scale).unsqueeze(-1) * A_inv
    return A * scale.unsqueeze(-2), A_inv, (c + bias) * scale, logabsdet + log_scale.sum(-1)


def _ordered(maps: _Maps, follows: Sequence[Any], precedes: Sequence[Any]) -> _Maps:
    """The maps from the orders of channels of the couplings before them to those of the couplings behind."""
    A, A_inv, c, logabsdet = maps
    if any(coupling is not None for coupling in follows):
        rows = _orders(follows, c)
        A = A.gather(-2, rows.unsqueeze(-1).expand_as(A))
        A_inv = None if A_inv is None else A_inv.gather(-1, rows.unsqueeze(-2).expand_as(A_inv))
    if any(coupling is not None for coupling in precedes):
        columns = _orders(precedes, c)
        A, c = A.gather(-1, columns.unsqueeze(-2).expand_as(A)), c.gather(-1, columns)
        A_inv = None if A_inv is None else A_inv.gather(-2, columns.unsqueeze(-1).expand_as(A_inv))
    return A, A_inv, c, logabsdet


def _orders(couplings: Sequence[Any], c: Tensor) -> Tensor:
    """The order of each, shaped as c."""
    same = torch.arange(c.shape[-1], device=c.device)
    orders = [same if coupling is None else coupling.order.indices() for coupling in couplings]
    return orders[0] if len(orders) == 1 else torch.stack(orders)


def _stacked(layers: Sequence[Any], name: str) -> Tensor:
    tensors = [layer.indices() if name == "permutation" else getattr(layer, name) for layer in layers]
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)
