"""A flow built layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.actnorm import ActNorm, find_far
from glf_fast.flow.base import Flow
from glf_fast.flow.coupling import Coupling
from glf_fast.flow.fixed_linear import FixedLinear
from glf_fast.flow.folding import AssembledProducts, InOrder, Product, Step, assembled, folded
from glf_fast.flow.linear import InvertibleLinear
from glf_fast.flow.reversible import check_reversible, run_reversible
from glf_fast.flow.split import Split
from glf_fast.flow.squeeze import Squeeze
from glf_fast.reference import log_normal

__all__ = ["SequentialFlow", "run_layers"]

_MANY_PIXELS = 64
# Layers that take images in either order of memory.
_ANY_ORDER = (ActNorm, InvertibleLinear, FixedLinear, Coupling, InOrder, Product, Split, Squeeze)
# Layers that a reversible backward undoes.
_UNDONE = (ActNorm, InvertibleLinear, FixedLinear, Coupling, InOrder, Product)


class SequentialFlow(Flow):
    """A chain of layers, z = f_n(… f_1(x)), whose log-determinants are added.

    A layer is any module with `forward(x, context)` and `inverse(z, context)` that return (output, logdet): `ActNorm`,
    `InvertibleLinear`, `AffineCoupling`, another `Flow`, or your own. If the last layer is a flow, its `log_prob` is used.

    What is affine between two couplings (`ActNorm`, `InvertibleLinear`, `FixedLinear`) is applied as one product of the
    channels, and all those products are assembled together. On a processor these layers, `AffineCoupling`, `Squeeze` and
    `Split` work on images in `torch.channels_last` order; other layers are given the order that the flow was given, and so is
    the result.

    A `Split` takes channels out of what follows, and a `Squeeze` makes channels of pixels: so several scales make one flow.
    z holds the numbers of all scales, those factored out first in front, in the shape of x; other layers in such a flow
    keep the shape of what they are given.

    Args:
        layers: the layers, first to last in the direction data → noise.
        event_shape: shape of one sample, (D,) or (C, H, W).
        context_dim: number of columns of the context, which every layer gets; 0 for no context.
        context_shape: shape of one context, instead of `context_dim`, if a context is not a vector.
        reversible: in the backward, rebuild what goes into the couplings and affine layers by undoing them, from the output of
            each run of such layers. Memory then does not grow with their number, but each conditioner runs twice. Gradients are
            equal but for rounding; second derivatives and `torch.func.functional_call` are refused, and torch.compile leaves
            these layers as they are.

    Raises:
        ValueError: shapes that cannot be squeezed or split; `reversible` with batch or spectral norms in the conditioners.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        event_shape: tuple[int, ...],
        context_dim: int = 0,
        *,
        context_shape: tuple[int, ...] | None = None,
        reversible: bool = False,
    ) -> None:
        super().__init__(event_shape, context_dim, context_shape=context_shape)
        self.layers = nn.ModuleList(layers)
        self.reversible = reversible
        self._products = AssembledProducts()
        if reversible:
            check_reversible(self.layers)
        self._noise_shapes()  # raises an error for shapes that cannot be squeezed or split

    def train(self, mode: bool = True) -> SequentialFlow:
        """Set the mode, and find anew which ActNorms are not folded into matrices because they move data far."""
        super().train(mode)
        find_far(self.layers)
        return self

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, *event_shape) → z like x, logdet (B,)."""
        return self._run(self.layers, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, *event_shape) → x like z, logdet (B,)."""
        self._check_event("z", z)
        context = self._expand_context(context, len(z))
        factored_out: list[Tensor] = []
        shapes = self._noise_shapes()
        if shapes:
            pieces = z.flatten(1).split([math.prod(shape) for shape in shapes], 1)
            *factored_out, z = (piece.view(-1, *shape) for piece, shape in zip(pieces, shapes, strict=True))
        return run_layers(
            self.layers, z, context, factored_out, inverse=True, reversible=self.reversible, assemble=self._products.get
        )

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) = log N(z; 0, I) + logdet in nats, (B,). The last layer computes log N if it has a `log_prob`."""
        layers: list[nn.Module] = list(self.layers)
        # A CouplingFlow's own log_prob is one operation. Permutations behind it change nothing about N(0, I).
        while layers and isinstance(layers[-1], InvertibleLinear) and layers[-1].linear == "permutation":
            layers.pop()
        last = layers[-1] if layers else None
        if (
            not (isinstance(last, Flow) or (type(last) is ActNorm and len(self.event_shape) == 1))
            or self._noise_shapes()
        ):
            z, logdet = self._run(layers, x, context)
            return log_normal(z) + logdet
        x, logdet = self._run(layers[:-1], x, context)
        return last.log_prob(x, context) + logdet

    def _run(self, layers: Iterable[nn.Module], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        self._check_event("x", x)
        context = self._expand_context(context, len(x))
        factored_out: list[Tensor] = []
        z, logdet = run_layers(
            layers, x, context, factored_out, inverse=False, reversible=self.reversible, assemble=self._products.get
        )
        if self._noise_shapes():
            z = torch.cat([piece.flatten(1) for piece in (*factored_out, z)], 1).view(x.shape)
        return z, logdet

    def _noise_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what each `Split` factors out, and of what comes out in the end; [] if no layer changes the shape."""
        shapes: list[tuple[int, ...]] = []
        shape, changed = self.event_shape, False
        for layer in self.layers:
            if isinstance(layer, Squeeze):
                shape, changed = layer.output_shape(shape), True
            elif isinstance(layer, Split):
                layer.check("samples", shape)
                shapes.append((layer.sizes[1], *shape[1:]))
                shape, changed = (layer.sizes[0], *shape[1:]), True
        return [*shapes, shape] if changed else []


def run_layers(
    layers: Iterable[nn.Module],
    x: Tensor,
    context: Tensor | None,
    factored_out: list[Tensor],
    *,
    inverse: bool,
    reversible: bool = False,
    assemble: Callable[..., Any] = assembled,
) -> tuple[Tensor, Tensor]:
    """The layers on x (B, D, …), the last one first if `inverse`: output, logdet (B,).

    What a `Split` factors out is appended to `factored_out`, and taken from its end if `inverse`. With `reversible`, runs of
    layers that keep the shape of x have a backward that rebuilds their activations. `assemble` is `assembled`, or a cache.
    """
    steps = folded(layers, inverse=inverse)
    maps, logabsdets = assemble(steps, inverse=inverse)
    pixels: dict[int, int] = {}
    logdets: list[Tensor] = []
    # Permutations move planes of contiguous images whole: flows with them and without matrices are faster in that order, on one
    # image by a third.
    kinds = {type(step) for step in steps}
    permutes = InvertibleLinear in kinds and Product not in kinds
    reorders = not permutes and any(isinstance(step, Coupling | InOrder) for step in steps)
    as_given = x.ndim != 4 or (x.stride(1) == 1 and not x.is_contiguous())  # in channels_last order, too
    if not as_given and x.requires_grad and torch.is_grad_enabled() and x.is_contiguous():
        x = x.flatten().view(x.shape)  # whose gradient is contiguous, in whatever order the layers leave it
    runs = _rebuilt_runs(steps, inverse=inverse) if reversible and torch.is_grad_enabled() else {}
    places = iter(reversed(range(len(steps))) if inverse else range(len(steps)))
    for place in places:
        step = steps[place]
        if not isinstance(step, _ANY_ORDER):
            x = x if as_given else x.contiguous()
        elif reorders and _gains_from_channels_last(x):
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        if run := runs.get(place):
            pixels |= dict.fromkeys(run, x.shape[2:].numel())
            x, logdet = run_reversible([steps[i] for i in run], [maps.get(i) for i in run], x, context, inverse=inverse)
            logdets.append(logdet)
            for _ in run[1:]:
                next(places)
            continue
        if isinstance(step, Product):
            pixels[place] = x.shape[2:].numel()
            x = ops.channel_map(x, *maps[place], inverse=inverse)
            continue
        if inverse and isinstance(step, Split):
            x = torch.cat([x, factored_out.pop()], 1)
        x, logdet = step.inverse(x, context) if inverse else step(x, context)  # type: ignore[operator]
        logdets.append(logdet)
        if isinstance(step, Split) and not inverse:
            x, z = x.split(step.sizes, 1)
            factored_out.append(z)
    of_products = [_of_pixels(logabsdet, pixels[place], len(x), inverse=inverse) for place, logabsdet in logabsdets]
    return x if as_given else x.contiguous(), _sum([*of_products, *logdets], x)


def _rebuilt_runs(steps: list[Step], *, inverse: bool) -> dict[int, list[int]]:
    """The runs of two or more steps that can be undone one by one, by the place of the first one: places in their order."""
    runs: dict[int, list[int]] = {}
    run: list[int] = []
    for place in [*(reversed(range(len(steps))) if inverse else range(len(steps))), None]:
        if place is not None and isinstance(steps[place], _UNDONE):
            run.append(place)
            continue
        if len(run) > 1:
            runs[run[0]] = run
        run = []
    return runs


def _gains_from_channels_last(x: Tensor) -> bool:
    """Whether a copy in channels_last order is worth its time, for an image whose channels lie apart.

    On a processor convolutions of 64 channels on 16 × 16 pixels, and with them a whole flow, take a tenth less time so, with
    and without the backward. On 4 × 4 pixels they gain nothing.
    """
    return x.device.type == "cpu" and x.ndim == 4 and x.shape[2:].numel() >= _MANY_PIXELS and x.is_contiguous()


def _of_pixels(logabsdet: Tensor, pixels: int, batch: int, *, inverse: bool) -> Tensor:
    """± pixels · log|det A| for each sample."""
    factor = -pixels if inverse else pixels
    return (logabsdet.clone() if factor == 1 else factor * logabsdet).expand(batch)


def _sum(logdets: list[Tensor], x: Tensor) -> Tensor:
    if not logdets:
        return x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    if x.ndim == 2:
        return reduce(add, logdets)
    return torch.stack(logdets).sum(0)  # two nodes for the backward, not one for each
