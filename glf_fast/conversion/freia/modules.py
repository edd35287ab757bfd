"""A FrEIA module as a layer of this project, and a fused flow as a FrEIA module: tuples in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.chains import ContextColumns, Part, Shape
from glf_fast.conversion.images import OnChannels
from glf_fast.conversion.layers import Bijection, ConversionError, check_started
from glf_fast.conversion.library import FusedLayer
from glf_fast.flow import Flow

__all__ = ["FreiaLayer", "KeptBlock", "PassedOn", "block_shape", "own_context"]


class KeptBlock(Bijection):
    """A FrEIA module as a layer: (x, context) → (z, logdet (B,)), with the context split into its conditions."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        block = part.module
        if type(block).__name__ in ("Flatten", "Reshape") and len(part.shape) == 1:
            raise ConversionError(f"{part.name} ({type(block).__name__}): only images become another shape")
        check_initialised(block)
        self.block = block
        self.index = (part.context or own_context(block)).index()
        self.widths = [dims[0] for dims in block.dims_c]

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.widths:
            assert context is not None
            (y,), jac = self.block((x,), c=list(context[:, self.index].split(self.widths, 1)), rev=inverse)
        else:
            (y,), jac = self.block((x,), rev=inverse)
        return y, jac + x.new_zeros(len(x))  # some return one number for the whole batch


def check_initialised(block: nn.Module) -> None:
    """Raise ConversionError for an ActNorm that has not seen a batch; releases after 0.2 have a buffer that says so."""
    check_started(not getattr(block, "init_on_next_batch", False) and bool(getattr(block, "is_initialized", True)))


def own_context(module: Any) -> ContextColumns:
    """The context of a module on its own: its conditions, in its own order."""
    width = sum(dims[0] for dims in module.dims_c)
    return ContextColumns(tuple(range(width)), width)


def block_shape(module: Any) -> Shape:
    """Shape of one sample that a module is given; () for a module of several inputs."""
    shapes = module.dims_in
    if isinstance(shapes[0], int):  # ActNorm keeps the one shape itself
        return tuple(shapes)
    return tuple(shapes[0]) if len(shapes) == 1 else ()


class FreiaLayer(FusedLayer):
    """An invertible module; dims_in and dims_c are the shapes that FrEIA gives its modules: of a sample, of its conditions."""

    def __init__(
        self, flow: Flow | OnChannels | None, dims_in: Sequence[Shape] = (), dims_c: Sequence[Shape] = ()
    ) -> None:
        super().__init__(flow)
        self.dims_in = list(dims_in)
        self.dims_c = list(dims_c)

    def forward(  # type: ignore[override]
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor | float]:
        """((B, *shape),) → the same, logdet (B,); noise → data if `rev`."""
        context = self._given(torch.cat(list(c), 1)) if c else None
        y, logdet = self.flow.inverse(x[0], context) if rev else self.flow(x[0], context)
        return (y,), logdet

    def output_dims(self, input_dims: list[Shape]) -> list[Shape]:
        """The shapes stay."""
        return input_dims


class PassedOn(FreiaLayer):
    """The place in a graph of a module that was fused into another one: hands its input on."""

    def __init__(self) -> None:
        super().__init__(None)

    def forward(  # type: ignore[override]
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor | float]:
        """((B, *shape),) → the same, 0."""
        return (x[0],), 0.0
