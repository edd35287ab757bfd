"""The protocol of a library: all that the conversion knows of one is in one object, in one file.

What does not depend on the library (accelerate, check, fuse, reading, …) asks its `Library` and names none. A new one is a file
with a `LIBRARY`, and an entry in `libraries.py`. It says where a flow has its layers (`Part`) and how others are put in their
place (`Chain`), how each layer is read, and what a whole flow computes. A coupling is declared once for vectors and images
(`couplings.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.chains import Chain, Part, Shape
from glf_fast.conversion.images import OnChannels
from glf_fast.conversion.layers import ConversionError, Diagonal, Layer, Unfusable, trained_together
from glf_fast.flow import Flow

__all__ = ["Base", "FusedLayer", "Library", "Reader", "check_shape", "declared_context"]


@dataclass(frozen=True)
class Base:
    """The base distribution: its shape, the layers from it to N(0, I), and N(0, I) noise → noise of the base."""

    shape: Shape
    layers: list[Layer] = field(default_factory=list)
    noise: Callable[[Tensor], Tensor] = lambda z: z

    @classmethod
    def normal(cls, name: str, loc: Tensor, log_scale: Tensor, *parameters: Tensor) -> Base:
        """N(loc, e^(2·log_scale)) of vectors, made of those parameters."""
        try:
            trained = trained_together(*parameters)
        except Unfusable as reason:
            raise ConversionError(f"base distribution {name}: {reason}") from None
        standard = not (trained or loc.any() or log_scale.any())
        layers = [] if standard else [Diagonal(-log_scale, -loc * torch.exp(-log_scale), trained)]
        return cls(tuple(loc.shape), list(layers), lambda z: loc + log_scale.exp() * z)


def check_shape(what: str, shape: Shape) -> None:
    """Raise ConversionError unless one sample of that shape is a vector or an image."""
    if len(shape) not in (1, 3):
        raise ConversionError(
            f"{what} works on samples of shape {tuple(shape)}: vectors and images (C, H, W) are covered"
        )


def declared_context(parts: Sequence[Part]) -> Shape:
    """The columns of the context that some network on vectors says that it was made for; () if none does."""
    for module in (module for part in parts if len(part.shape) == 1 for module in part.module.modules()):
        layer = getattr(module, "context_layer", None)  # of a MADE
        features = layer.in_features if isinstance(layer, nn.Linear) else getattr(module, "context_features", None)
        if isinstance(features, int):
            return (features,)
    return ()


class FusedLayer(nn.Module):
    """A fused flow as a layer of a library: what `Library.fused` returns. `forward` is data → noise.

    Libraries call their layers by these methods and ask nothing more of them; some want other arguments, or directions.
    """

    def __init__(self, flow: Flow | OnChannels | None) -> None:
        super().__init__()
        self.flow: Any = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        """Data → noise: x (B, *shape) → z like x, logdet (B,)."""
        return self.flow(x, self._given(context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Any:
        """Noise → data: z (B, *shape) → x like z, logdet (B,)."""
        return self.flow.inverse(z, self._given(context))

    def _given(self, context: Tensor | None) -> Tensor | None:
        """The context, for a flow that takes one: a library hands it to all its layers.

        On images it is for the library's own networks, which know what to do with it.
        """
        return context if isinstance(self.flow, OnChannels) or self.flow.context_dim else None


Reader = Callable[[Part], list[Layer]]


@dataclass(frozen=True, kw_only=True)
class Library:
    """What the conversion knows of a library.

    package: its name when it is imported. Only its own flows import it, never this project.
    flows: names of the classes that `convert` takes.
    hosts: of those besides, in whose objects `accelerate` replaces layers.
    packages: modules whose classes are flows and layers.
    chains: where a flow has its layers; several where it is multi-scale. Raises ConversionError.
    base: its base distribution. Raises ConversionError where `convert` cannot take it, or the flow for another reason.
    log_prob: (flow, x, context) → log p (B,), and generate: (flow, noise of the base, context) → data, by the library itself.
    kept: a part as (x, context) → (z, logdet (B,)), data → noise, and `inverse` back.
    fused: a fused flow, in place of some parts, as a layer of the library.
    on_vectors, on_images: class of a layer → its reader.
    compositions: class of a layer made of layers → the name of its list.
    refused: class of a layer → why it cannot even be kept.
    alone: classes of layers that are worth replacing where there is no coupling beside them.
    own_hooks: classes whose backward hooks are the library's own.
    any_size: whether the layers on images work on another number of pixels.
    shape_before: of what a layer is given that returns that shape.
    embedding: the network of a flow that the context goes through first.
    context_shape: of one context, behind that network, that parts say they take.
    in_one_context: the parts of a flow of one chain with `context`, where they are given different conditions.
    invertible: whether the library's inverse of parts, read into layers, is one to compare with.
    prepare: makes a copy in float64, of a flow or of layers, one to compare with.
    """

    package: str
    flows: tuple[str, ...]
    hosts: tuple[str, ...] = ()
    packages: tuple[str, ...]
    chains: Callable[[Any], list[Chain]]
    base: Callable[[Any], Base]
    log_prob: Callable[[Any, Tensor, Tensor | None], Tensor]
    generate: Callable[[Any, Tensor, Tensor | None], Tensor]
    kept: Callable[[Part], nn.Module]
    fused: Callable[[Flow | OnChannels, Sequence[Part]], nn.Module]
    on_vectors: Mapping[str, Reader]
    on_images: Mapping[str, Reader] = field(default_factory=dict)
    compositions: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()
    own_hooks: frozenset[str] = frozenset()
    any_size: bool = True
    shape_before: Callable[[Any, Shape], Shape] = lambda module, shape: shape
    embedding: Callable[[Any], nn.Module | None] = lambda flow: None
    context_shape: Callable[[Sequence[Part]], Shape] = declared_context
    in_one_context: Callable[[list[Part]], list[Part]] = lambda parts: parts
    invertible: Callable[[Sequence[Part], Sequence[Layer]], bool] = lambda parts, layers: True
    prepare: Callable[[nn.Module], None] = lambda copied: None

    def keep(self, part: Part) -> nn.Module:
        """`kept`; raises ConversionError."""
        kind = type(part.module).__name__
        if kind in self.refused:
            raise ConversionError(f"{part.name} ({kind}): {self.refused[kind]}")
        return self.kept(part)

    def owns(self, kind: type) -> bool:
        """Whether a class comes from the library."""
        return kind.__module__.partition(".")[0] == self.package

    def read(self, part: Part) -> list[Layer]:
        """The layers that one part is; raises Unfusable."""
        kind = type(part.module)
        images = len(part.shape) > 1
        reader = (self.on_images if images else self.on_vectors).get(kind.__name__)
        if reader is None or not self.owns(kind):
            raise Unfusable(f"no kernel covers this kind of layer{' on images' if images else ''}")
        if len(part.shape) not in (1, 3):
            raise Unfusable(f"it works on {part.shape or 'several samples'}, not on one vector or image")
        return reader(part)

    def read_inside(self, part: Part, inner: nn.Module) -> list[Layer]:
        """The layers of a module inside of a part's, which works on samples of the same shape; raises Unfusable."""
        layers: list[Layer] = []
        for _, module in self.flattened(inner, part.name):
            try:
                layers += self.read(replace(part, module=module))
            except Unfusable as reason:
                raise Unfusable(f"{type(module).__name__} in it: {reason}") from reason
        return layers

    def placed(self, named: Sequence[tuple[str, Any]], noise: Shape) -> list[Part]:
        """The parts, data → noise, with the shape of what each is given, by that of what the last one returns."""
        parts: list[Part] = []
        for name, module in reversed(named):
            noise = self.shape_before(module, noise)
            parts.insert(0, Part(name, module, noise))
        return parts

    def flattened(self, module: Any, name: str) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of the layers in `module`, one by one, in nested compositions, too."""
        inner = self.compositions.get(type(module).__name__) if self.owns(type(module)) else None
        if inner is None:
            yield name, module
            return
        for i, part in enumerate(getattr(module, inner)):
            yield from self.flattened(part, f"{name}.{inner}.{i}")
