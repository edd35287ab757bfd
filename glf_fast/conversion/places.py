"""Where a library's flow keeps its layers: how to read each of them, and how to put others in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from glf_fast.conversion import adapters, freia, freia_blocks, nflows, normflows, zuko
from glf_fast.conversion.images import freia as freia_images
from glf_fast.conversion.images import nflows as nflows_images
from glf_fast.conversion.images import normflows as normflows_images
from glf_fast.conversion.images import on_images
from glf_fast.conversion.images.modules import OnChannels
from glf_fast.conversion.layers import Layer
from glf_fast.conversion.putting import Replacement, module_list, put_in_graph, put_in_sequence, put_transform, replaced
from glf_fast.conversion.reading import ConversionError, check_vectors
from glf_fast.flow import Flow

__all__ = ["Place", "Replacement", "Shape", "is_layer", "places_of"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A list of layers in a flow of a library, which work one after the other.

    named: name and module of each layer, data → noise.
    shapes: of one sample that each layer is given, (D,) or (C, H, W).
    conditions: of each layer, which conditions it is given, where that differs from layer to layer (FrEIA).
    read: one module's layers, on samples of that shape; raises Unfusable.
    keep: a module as (x, context) → (z, logdet), data → noise, and `inverse` back.
    adapt: (flow, the modules that it replaces) → what takes their place.
    put: a list of replacements (start, stop, adapter) takes the places named[start:stop].
    has_inverse: (modules, the layers that they were read into) → whether `keep`'s inverse is one to compare with.
    check_shapes: those that a comparison may use instead of a layer's own, the cheapest first.
    context_shape: (the modules, that shape) → of one sample's context that networks on images say they take, or ().
    alone: classes of layers that are worth replacing where there is no coupling beside them.
    """

    named: list[tuple[str, nn.Module]]
    shapes: list[Shape]
    conditions: list[tuple[int, ...]]
    read: Callable[[nn.Module, Shape], list[Layer]]
    keep: Callable[[nn.Module], nn.Module]
    adapt: Callable[[Flow | OnChannels, Sequence[nn.Module]], nn.Module]
    put: Callable[[Sequence[Replacement]], None]
    has_inverse: Callable[[Sequence[nn.Module], Sequence[Layer]], bool] = lambda modules, layers: True
    check_shapes: Callable[[Shape], Sequence[Shape]] = lambda shape: [shape]
    context_shape: Callable[[Sequence[nn.Module], Shape], Shape] = lambda modules, shape: ()
    alone: frozenset[str] = frozenset()


def places_of(module: nn.Module) -> list[Place]:
    """The places in which `module` keeps its layers; none if it is no flow of a library that is known.

    Raises ConversionError, with the reason, for a flow none of whose layers can be replaced.
    """
    for kind in type(module).__mro__:
        library = kind.__module__.partition(".")[0]
        places = _PLACES.get(f"{library}.{kind.__name__}")
        if places is not None:
            changed = _overridden(type(module), kind, library)
            if changed:
                raise ConversionError(
                    f"{type(module).__name__} has its own {', '.join(changed)}, which may read the layers: give convert the "
                    "flow, or move them to a module around it"
                )
            return places(module)
    return []


def _overridden(kind: type, base: type, library: str) -> list[str]:
    """Methods of the library's class `base` that a class from elsewhere, `kind`, has replaced."""
    names = {name for name in dir(base) if name == "forward" or not hasattr(nn.Module, name)}
    elsewhere = [
        vars(k)
        for k in kind.__mro__
        if k is not base and issubclass(k, base) and not k.__module__.startswith(f"{library}.")
    ]
    return sorted(names & {name for own in elsewhere for name in own if callable(own[name])})


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is a flow or a flow's layer of one of the libraries, not a network or a distribution."""
    parts = type(module).__module__.split(".")
    return ".".join(parts[:2]) in _LAYERS


_LAYERS = (
    "FrEIA.framework", "FrEIA.modules", "nflows.flows", "nflows.transforms", "normflows.core", "normflows.flows",
    "zuko.flows", "zuko.lazy",
)  # fmt: skip


def _normflows(flow: Any) -> list[Place]:
    named = list(normflows.named_layers(flow.flows))
    if on_images(flow):
        return [_normflows_images(named, tuple(flow.q0.shape), partial(setattr, flow, "flows"), flow.flows)]
    # 0 where no layer says so: then there is none that could be read.
    dim = next((d for d in (normflows.columns(module) for _, module in named) if d is not None), 0)
    return [
        Place(
            named=named,
            shapes=[(dim,)] * len(named),
            conditions=[()] * len(named),
            read=lambda module, shape: normflows.read_layer(module, shape[0]),
            keep=normflows.KeptLayer,
            adapt=lambda fused, _: adapters.NormflowsLayer(fused),
            put=partial(_put_normflows, named, partial(setattr, flow, "flows"), flow.flows),
        )
    ]


def _normflows_multiscale(flow: Any) -> list[Place]:
    """One for every level, from the noise on: a merge after each but the last takes in the noise of the next one."""
    places: list[Place] = []
    shape: Shape = tuple(flow.q0[0].shape)
    for i, level in enumerate(flow.flows):
        if i:
            C, H, W = flow.q0[i].shape
            mode = getattr(flow.merges[i - 1], "mode", "")
            if not mode.startswith("channel"):
                raise ConversionError(f"merges.{i - 1} ({type(flow.merges[i - 1]).__name__}) does not join channels")
            shape = (shape[0] + C, H, W)
        named = list(normflows.named_layers(level, f"flows.{i}"))
        places.append(_normflows_images(named, shape, partial(setattr, flow.flows, str(i)), level))
        shape = places[-1].shapes[0] if named else shape
    return places


def _normflows_images(
    named: list[tuple[str, nn.Module]], noise: Shape, set_list: Callable[[nn.ModuleList], None], layers: nn.ModuleList
) -> Place:
    return Place(
        named=named,
        shapes=normflows_images.level_shapes([module for _, module in named], noise),
        conditions=[()] * len(named),
        read=normflows_images.read_layer,
        keep=normflows.KeptLayer,
        adapt=lambda fused, _: adapters.NormflowsLayer(fused),
        put=partial(_put_normflows, named, set_list, layers),
        check_shapes=_small_first,
    )


def _put_normflows(
    named: Sequence[tuple[str, nn.Module]],
    set_list: Callable[[nn.ModuleList], None],
    layers: nn.ModuleList,
    replacements: Sequence[Replacement],
) -> None:
    set_list(module_list(reversed(replaced([module for _, module in named], replacements)), layers))


def _small_first(shape: Shape) -> list[Shape]:
    """A few pixels say as much as many, where the networks take them."""
    C, H, W = shape
    return [(C, 4, 6), shape] if H * W > 100 else [shape]


def _nflows(flow: Any) -> list[Place]:
    shape: Shape = tuple(getattr(flow._distribution, "_shape", ()))
    named = list(nflows.transforms(flow._transform))
    if any(type(module).__name__ == "MultiscaleCompositeTransform" for _, module in named) or len(shape) == 3:
        return _nflows_images(flow, "_transform", "_transform", shape)
    check_vectors("it", shape)
    return [
        Place(
            named=named,
            shapes=[shape] * len(named),
            conditions=[()] * len(named),
            read=lambda module, shape: nflows.read_transform(module, shape[0]),
            keep=nflows.KeptTransform,
            adapt=lambda fused, _: adapters.NflowsLayer(fused),
            put=partial(put_transform, flow, "_transform", "_transforms", named),
            has_inverse=lambda modules, _: nflows.has_inverse(modules),
        )
    ]


def _nflows_images(holder: nn.Module, name: str, path: str, noise: Shape) -> list[Place]:
    """Of holder.`name`, one transform or a composition, and of the scales of what is multi-scale in it."""
    named = list(nflows.transforms(getattr(holder, name), path))
    places = [
        place
        for path, module in named
        if type(module).__name__ == "MultiscaleCompositeTransform"
        for i, shape in enumerate(nflows_images.scale_shapes(module))
        for place in _nflows_images(module._transforms, str(i), f"{path}._transforms.{i}", shape)  # type: ignore[arg-type]
    ]
    if places and len(named) == 1:
        return places
    outer = Place(
        named=named,
        shapes=nflows_images.input_shapes([module for _, module in named], noise),
        conditions=[()] * len(named),
        read=nflows_images.read_transform,
        keep=nflows.KeptTransform,
        adapt=lambda fused, _: adapters.NflowsLayer(fused),
        put=partial(put_transform, holder, name, "_transforms", named),
        check_shapes=_small_first,
        # 1.1 to 2.8 times as fast (12 and 48 channels, 64 to 8,192 pixels, one core); normflows' own is not slower than ours.
        alone=frozenset({"OneByOneConvolution"}),
        context_shape=lambda modules, shape: nflows_images.network_context(
            (part for module in modules for part in module.modules()), shape
        ),
    )
    return [outer, *places]


def _zuko(flow: Any) -> list[Place]:
    named = list(zuko.transforms(flow.transform))
    try:
        shape = tuple(flow.base().event_shape)
    except Exception as error:  # a base that only a context makes a distribution
        raise ConversionError("its base depends on the context, and does not say how many columns it has") from error
    check_vectors("it", shape)
    return [
        Place(
            named=named,
            shapes=[shape] * len(named),
            conditions=[()] * len(named),
            read=lambda module, shape: zuko.read_transform(module, shape[0]),
            keep=zuko.KeptTransform,
            adapt=lambda fused, _: adapters.ZukoLayer(fused),
            put=partial(put_transform, flow, "transform", "transforms", named),
        )
    ]


def _freia(inn: Any) -> list[Place]:
    blocks, _ = freia_blocks.blocks(inn)
    put = partial(put_in_sequence, inn, blocks) if freia_blocks.is_sequence(inn) else partial(put_in_graph, inn)
    return [
        Place(
            named=[(block.name, block.module) for block in blocks],
            shapes=[freia_blocks.block_shape(block.module) for block in blocks],
            conditions=[block.conditions for block in blocks],
            read=lambda module, shape: freia_images.read_layer(module, freia_blocks.own_context(module)),
            keep=freia_blocks.keep_alone,
            adapt=_freia_layer,
            put=put,
            has_inverse=lambda _, layers: freia.has_exact_inverse(layers),
            context_shape=_conditions_shape,
        )
    ]


def _freia_layer(fused: Flow | OnChannels, modules: Sequence[Any]) -> nn.Module:
    return adapters.FreiaLayer(fused, [freia_blocks.block_shape(modules[0])], _conditions(modules))


def _conditions(modules: Sequence[Any]) -> Sequence[Sequence[int]]:
    """Shapes of the conditions that modules of one run are given: those that are, are given the same."""
    return next((module.dims_c for module in modules if module.dims_c), ())


def _conditions_shape(modules: Sequence[Any], shape: Shape) -> Shape:
    """Of the conditions side by side."""
    given = _conditions(modules)
    return (sum(dims[0] for dims in given), *given[0][1:]) if given else ()


_PLACES: dict[str, Callable[[Any], list[Place]]] = {
    "FrEIA.GraphINN": _freia,
    "FrEIA.SequenceINN": _freia,
    "nflows.Flow": _nflows,
    "normflows.ClassCondFlow": _normflows,
    "normflows.MultiscaleFlow": _normflows_multiscale,
    "normflows.NormalizingFlow": _normflows,
    "normflows.NormalizingFlowVAE": _normflows,
    "zuko.Flow": _zuko,
}
