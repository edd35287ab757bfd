"""The protocol of a library: all that the conversion knows of one is in one object, in one file.

The rest (accelerate, check, fuse, reading, …) asks the `Library` of a flow and names none. A new library is a file with a
`LIBRARY`, and an entry in `libraries.py`. A coupling is declared once for vectors and images (`couplings.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from glf_fast.conversion.chains import Chain, Part, Shape
from glf_fast.conversion.images import OnChannels
from glf_fast.conversion.layers import ConversionError, Diagonal, Kept, Layer, Unfusable, trained_together
from glf_fast.flow import Flow, Squeeze

__all__ = [
    "Base",
    "FusedLayer",
    "Library",
    "Reader",
    "Unpacked",
    "check_shape",
    "overridden",
    "run_on_rows",
]


@dataclass(frozen=True)
class Base:
    """The base distribution of a flow; of one of several scales, in the shape of the data."""

    shape: Shape
    layers: list[Layer] = field(default_factory=list)  # from it to N(0, I)
    noise: Callable[[Tensor], Tensor] = lambda z: z  # N(0, I) → noise of the base
    # After each chain but the last: a `Split` that is not learned, and what is before it.
    between: tuple[list[Layer], ...] = ()

    @classmethod
    def normal(cls, name: str, loc: Tensor, log_scale: Tensor, *parameters: Tensor) -> Base:
        """N(loc, e^(2·log_scale)) of vectors, made of those parameters."""
        try:
            trained = trained_together(*parameters)
        except Unfusable as reason:
            raise ConversionError(f"base distribution {name}: {reason}") from None
        layers: list[Layer] = []
        if trained or loc.any() or log_scale.any():
            layers.append(Diagonal(-log_scale, -loc * torch.exp(-log_scale), trained))
        return cls(tuple(loc.shape), layers, lambda z: loc + log_scale.exp() * z)


def check_shape(what: str, shape: Shape) -> None:
    """Raise ConversionError unless one sample of that shape is a vector or an image."""
    if len(shape) not in (1, 3):
        raise ConversionError(
            f"{what} works on samples of shape {tuple(shape)}: vectors and images (C, H, W) are covered"
        )


def _declared_context(parts: Sequence[Part]) -> Shape:
    """The shape of the context that some network says that it was made for, as nflows' networks do; () if none does."""
    for part in parts:
        pixels = part.shape[1:]
        for module in part.module.modules():
            layer = getattr(module, "context_layer", None)  # of a MADE
            features = layer.in_features if isinstance(layer, nn.Linear) else getattr(module, "context_features", None)
            found = getattr(module, "context_channels", None) if pixels else features
            if isinstance(found, int):
                return (found, *pixels)
    return ()


class Unpacked(nn.Module):
    """A layer that was in a composition, in the place of a layer of the flow itself.

    Compositions of some libraries take one log-determinant for a whole batch, where their flows need one for each sample.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """The layer's result, with logdet (B,)."""
        y, logdet = self.layer(x, *arguments, **options)
        return y, logdet + x.new_zeros(len(x))

    def inverse(self, y: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """The layer's inverse, with logdet (B,)."""
        x, logdet = self.layer.inverse(y, *arguments, **options)
        return x, logdet + y.new_zeros(len(y))


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


def run_on_rows(
    direction: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]], x: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A direction of a flow on vectors, for a batch of any shape: x (…, D), context (…, C) → (…, D), log-determinant (…)."""
    batch = x.shape[:-1]
    if context is not None:
        context = context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])
    y, logdet = direction(x.reshape(-1, x.shape[-1]), context)
    return y.reshape(*batch, y.shape[-1]), logdet.reshape(batch)


def overridden(kind: type, base: type) -> list[str]:
    """The methods of `base` that its subclass `kind` has replaced, without constructors."""
    methods = (name for name in dir(base) if inspect.isfunction(getattr(base, name)) and name != "__init__")
    return [name for name in methods if getattr(kind, name) is not getattr(base, name)]


Reader = Callable[[Part], list[Layer]]


def _not_converted(flow: Any, *arguments: Any) -> NoReturn:
    raise ConversionError("glf_fast.accelerate replaces its layers in place; convert does not take it")


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library, as far as the conversion knows it. Classes of its layers are given by name."""

    package: str  # its name when it is imported; only its own flows import it, never this project
    flows: tuple[str, ...] = ()  # classes that `convert` takes
    hosts: tuple[str, ...] = ()  # further classes in whose objects `accelerate` replaces layers
    packages: tuple[str, ...] = ()  # modules whose classes are flows and layers
    marks: tuple[str, ...]  # attributes that its flows have, by which copies of their classes are known
    # Where a flow has its layers, several if multi-scale: data → noise; raises ConversionError.
    chains: Callable[[Any], list[Chain]]
    log_prob: Callable[[Any, Tensor, Tensor | None], Tensor]  # (flow, x, context) → log p (B,)
    kept: Callable[[Part], nn.Module]  # a part as a layer of this project, see `Kept`
    fused: Callable[[Flow | OnChannels, Sequence[Part]], nn.Module]  # a flow, in place of parts, as the library's layer
    # For `convert`: raises ConversionError where it cannot take the base, or the flow for another reason.
    base: Callable[[Any], Base] = _not_converted
    # For `convert`: (flow, noise of the base, context) → data.
    generate: Callable[[Any, Tensor, Tensor | None], Tensor] = _not_converted
    on_vectors: Mapping[str, Reader] = field(default_factory=dict)
    on_images: Mapping[str, Reader] = field(default_factory=dict)
    # Class that moves pixels to channels → the factor by which it makes images smaller.
    squeezes: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)
    compositions: Mapping[str, str] = field(default_factory=dict)  # class made of layers → the name of its list
    refused: Mapping[str, str] = field(default_factory=dict)  # class → why it cannot even be kept
    alone: frozenset[str] = frozenset()  # classes that are worth replacing where there is no coupling beside them
    own_hooks: frozenset[str] = frozenset()  # classes whose backward hooks are the library's own
    shape_before: Callable[[Any, Shape], Shape] = lambda module, shape: shape  # (layer, output's shape) → its input's
    embedding: Callable[[Any], nn.Module | None] = lambda flow: None  # the network that a context goes through first
    context_shape: Callable[[Sequence[Part]], Shape] = _declared_context  # of one context behind it, as the parts say
    # The parts of a flow of one chain with `context`, where they are given different conditions.
    in_one_context: Callable[[list[Part]], list[Part]] = lambda parts: parts
    # True if the library's inverse of parts, read into layers, is one to compare with.
    invertible: Callable[[Sequence[Part], Sequence[Layer]], bool] = lambda parts, layers: True
    # Makes a copy in float64, of a flow or of layers, one to compare with.
    prepare: Callable[[nn.Module], None] = lambda copied: None

    def keep(self, part: Part) -> nn.Module:
        """`kept`; raises ConversionError."""
        kind = type(part.module).__name__
        if kind in self.refused:
            raise ConversionError(f"{part.name} ({kind}): {self.refused[kind]}")
        return self.kept(part)

    def owns(self, kind: type) -> bool:
        """True for a class of the library, or of a copy of its package inside of another one."""
        root, *path = kind.__module__.split(".")
        return root == self.package or (self.package in path and root != "glf_fast")

    def host(self, module: nn.Module, names: Sequence[str]) -> type | None:
        """The class of a flow, of those names, that `module` is an instance of: the library's, or a copy of it; or None."""
        for kind in (kind for kind in type(module).__mro__ if kind.__name__ in names):
            if self.owns(kind):
                return kind
            if not kind.__module__.startswith("glf_fast.") and all(hasattr(module, mark) for mark in self.marks):
                return kind
        return None

    def name_of(self, kind: type) -> str:
        """The name under which the library knows a layer's class, its own, an empty subclass of one, or a copy; else "".

        A class of that name that is no copy fails to be read, or in the proof of the conversion.
        """
        for base in kind.__mro__:
            if any(base.__name__ in n for n in (self.on_vectors, self.on_images, self.squeezes, self.compositions)):
                return "" if overridden(kind, base) else base.__name__
        return ""

    def read(self, part: Part) -> list[Layer]:
        """The layers of one part; raises Unfusable."""
        if isinstance(part.module, FusedLayer):
            raise Unfusable("fused before")
        images = len(part.shape) > 1
        name = self.name_of(type(part.module))
        if images and name in self.squeezes:
            stays = f"{part.name} ({name}): moves pixels to channels, and stays"
            return [Kept(Squeeze(self.squeezes[name](part.module)), stays)]
        reader = (self.on_images if images else self.on_vectors).get(name)
        if reader is None:
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
            factor = self.squeezes.get(type(module).__name__)
            if factor is not None and len(noise) == 3:
                n, (C, H, W) = factor(module), noise
                noise = C // n**2, H * n, W * n
            noise = self.shape_before(module, noise)
            parts.insert(0, Part(name, module, noise))
        return parts

    def flattened(self, module: Any, name: str) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of the layers in `module`, one by one, in nested compositions, too."""
        if isinstance(module, Unpacked):
            module = module.layer
        inner = self.compositions.get(self.name_of(type(module)))
        if inner is None:
            yield name, module
            return
        for i, part in enumerate(getattr(module, inner)):
            yield from self.flattened(part, f"{name}.{inner}.{i}")
