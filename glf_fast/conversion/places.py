"""Where a library's flow keeps its layers: how to read each of them, and how to put others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from glf_fast.conversion import adapters, freia, nflows, normflows, zuko
from glf_fast.conversion.layers import Layer
from glf_fast.conversion.reading import ConversionError, check_vectors
from glf_fast.flow import Flow

__all__ = ["Place", "Replacement", "is_layer", "place_of"]


@dataclass(frozen=True)
class Place:
    """The layers of one flow of a library.

    named: name and module of each layer, data → noise.
    conditions: of each layer, which conditions it is given, where that differs from layer to layer (FrEIA).
    dim: D.
    read: one module's layers; raises Unfusable.
    keep: a module as (x, context) → (z, logdet), data → noise, and `inverse` back.
    adapt: (flow, the modules that it replaces) → what takes their place.
    put: a list of replacements (start, stop, adapter) takes the places named[start:stop].
    has_inverse: (modules, the layers that they were read into) → whether `keep`'s inverse is one to compare with.
    """

    named: list[tuple[str, nn.Module]]
    conditions: list[tuple[int, ...]]
    dim: int
    read: Callable[[nn.Module], list[Layer]]
    keep: Callable[[nn.Module], nn.Module]
    adapt: Callable[[Flow, Sequence[nn.Module]], nn.Module]
    put: Callable[[Sequence[Replacement]], None]
    has_inverse: Callable[[Sequence[nn.Module], Sequence[Layer]], bool] = lambda modules, layers: True


Replacement = tuple[int, int, nn.Module]


def place_of(module: nn.Module) -> Place | None:
    """The place in which `module` keeps its layers; None if it is no flow of a library that is known.

    Raises ConversionError, with the reason, for a flow none of whose layers can be replaced.
    """
    for kind in type(module).__mro__:
        library = kind.__module__.partition(".")[0]
        place = _PLACES.get(f"{library}.{kind.__name__}")
        if place is not None:
            changed = _overridden(type(module), kind, library)
            if changed:
                raise ConversionError(
                    f"{type(module).__name__} has its own {', '.join(changed)}, which may read the layers: give convert the "
                    "flow, or move them to a module around it"
                )
            return place(module)
    return None


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


def _normflows(flow: Any) -> Place:
    named = list(normflows.named_layers(flow.flows))
    # 0 where no layer says so: then there is none that could be read.
    dim = next((d for d in (normflows.columns(module) for _, module in named) if d is not None), 0)

    def put(replacements: Sequence[Replacement]) -> None:
        flow.flows = _list(reversed(_replaced([m for _, m in named], replacements)), flow.flows)

    return Place(
        named=named,
        conditions=[()] * len(named),
        dim=dim,
        read=lambda module: normflows.read_layer(module, dim),
        keep=normflows.KeptLayer,
        adapt=lambda fused, _: adapters.NormflowsLayer(fused),
        put=put,
    )


def _nflows(flow: Any) -> Place:
    named = list(nflows.transforms(flow._transform))
    shape = tuple(getattr(flow._distribution, "_shape", ()))
    check_vectors("it", shape)

    return Place(
        named=named,
        conditions=[()] * len(named),
        dim=shape[0],
        read=lambda module: nflows.read_transform(module, shape[0]),
        keep=nflows.KeptTransform,
        adapt=lambda fused, _: adapters.NflowsLayer(fused),
        put=partial(_put_transform, flow, "_transform", "_transforms", named),
        has_inverse=lambda modules, _: nflows.has_inverse(modules),
    )


def _zuko(flow: Any) -> Place:
    named = list(zuko.transforms(flow.transform))
    try:
        shape = tuple(flow.base().event_shape)
    except Exception as error:  # a base that only a context makes a distribution
        raise ConversionError("its base depends on the context, and does not say how many columns it has") from error
    check_vectors("it", shape)

    return Place(
        named=named,
        conditions=[()] * len(named),
        dim=shape[0],
        read=lambda module: zuko.read_transform(module, shape[0]),
        keep=zuko.KeptTransform,
        adapt=lambda fused, _: adapters.ZukoLayer(fused),
        put=partial(_put_transform, flow, "transform", "transforms", named),
    )


def _freia(inn: Any) -> Place:
    blocks, shape = freia.blocks(inn)
    check_vectors("it", shape)

    def put(replacements: Sequence[Replacement]) -> None:
        if type(inn).__name__ == "SequenceINN":
            _put_in_sequence(inn, blocks, replacements)
        else:
            _put_in_graph(inn, replacements)

    return Place(
        named=[(block.name, block.module) for block in blocks],
        conditions=[block.conditions for block in blocks],
        dim=shape[0],
        read=lambda module: freia.read_layer(module, freia.own_context(module)),
        keep=freia.keep_alone,
        adapt=_freia_layer,
        put=put,
        has_inverse=lambda _, layers: freia.has_exact_inverse(layers),
    )


def _freia_layer(fused: Flow, modules: Sequence[Any]) -> nn.Module:
    return adapters.FreiaLayer(fused, next((module.dims_c for module in modules if module.dims_c), ()))


def _put_in_sequence(inn: Any, blocks: Sequence[freia.Block], replacements: Sequence[Replacement]) -> None:
    conditions: list[int | None] = []
    starts = {start: stop for start, stop, _ in replacements}
    shapes, i = [inn.shapes[0]], 0
    while i < len(blocks):
        stop = starts.get(i, i + 1)
        given = [index for block in blocks[i:stop] for index in block.conditions]
        conditions.append(given[0] if given else None)
        shapes.append(inn.shapes[0])
        i = stop
    inn.module_list = _list(_replaced([block.module for block in blocks], replacements), inn.module_list)
    inn.conditions, inn.shapes = conditions, shapes


def _put_in_graph(inn: Any, replacements: Sequence[Replacement]) -> None:
    """The node that is given the conditions gets the fused module, the others hand on what they get."""
    chain = [node for node in inn.node_list if node.module is not None]
    originals = [node.module for node in chain]
    for start, stop, adapter in replacements:
        holder = next((i for i in range(start, stop) if chain[i].conditions), start)
        for i in range(start, stop):
            originals[i] = adapter if i == holder else adapters.PassedOn().train(adapter.training)
    for node, module in zip(chain, originals, strict=True):
        node.module = module
    inn.module_list = _list(originals, inn.module_list)


def _put_transform(
    flow: nn.Module, name: str, chain: str, named: list[tuple[str, nn.Module]], replacements: Sequence[Replacement]
) -> None:
    """Put them where flow.`name` is one transform, or has its transforms in a list called `chain`."""
    modules, transform = _replaced([m for _, m in named], replacements), getattr(flow, name)
    if len(named) == 1 and transform is named[0][1]:
        (module,) = modules
        setattr(flow, name, module)
    else:
        setattr(transform, chain, _list(modules, getattr(transform, chain)))


def _list(modules: Iterable[nn.Module], instead_of: nn.Module) -> nn.ModuleList:
    """In the same mode; the modules keep theirs."""
    new = nn.ModuleList(modules)
    new.training = instead_of.training
    return new


def _replaced(modules: Sequence[nn.Module], replacements: Sequence[Replacement]) -> list[nn.Module]:
    result, position = [], 0
    for start, stop, adapter in replacements:
        result += [*modules[position:start], adapter]
        position = stop
    return [*result, *modules[position:]]


_PLACES: dict[str, Callable[[Any], Place]] = {
    "FrEIA.GraphINN": _freia,
    "FrEIA.SequenceINN": _freia,
    "nflows.Flow": _nflows,
    "normflows.ClassCondFlow": _normflows,
    "normflows.NormalizingFlow": _normflows,
    "normflows.NormalizingFlowVAE": _normflows,
    "zuko.Flow": _zuko,
}
