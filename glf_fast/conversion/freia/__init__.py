"""FrEIA: `SequenceINN` and `GraphINN`; `convert` takes a graph that is a chain from one input to one output.

It knows no base distribution; N(0, I) is meant. Its conditions become one context: those that some block uses, concatenated
in the order of their indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from glf_fast.conversion.chains import Chain, ContextColumns, Part, Replacement, Shape, module_list, replaced
from glf_fast.conversion.freia.modules import FreiaLayer, KeptBlock, PassedOn, block_shape, own_context
from glf_fast.conversion.freia.readers import ON_IMAGES, ON_VECTORS
from glf_fast.conversion.images import OnChannels
from glf_fast.conversion.layers import ConversionError, Dense
from glf_fast.conversion.library import Base, Library
from glf_fast.flow import Flow
from glf_fast.reference import log_normal

__all__ = ["LIBRARY"]


def _chains(flow: Any) -> list[Chain]:
    """One of a sequence; of a graph, each run of nodes with one input and one output, and every other node by itself."""
    if _is_sequence(flow):
        parts = [
            Part(f"module_list.{i}", module, block_shape(module), () if index is None else (index,))
            for i, (module, index) in enumerate(zip(flow.module_list, flow.conditions, strict=True))
        ]
        return [Chain(parts, partial(_put_in_sequence, flow, parts))]
    runs: list[list[Any]] = []
    for node in _inner_nodes(flow):
        before = node.inputs[0][0]
        run = next((run for run in runs if run[-1] is before), None)
        if (
            run
            and node.inputs == [(before, 0)]
            and len(before.outputs) == 1 == len(node.outputs)
            and _is_single(run[0])
        ):
            run.append(node)
        else:
            runs.append([node])
    return [Chain([_part(flow, node) for node in run], partial(_put_in_graph, flow, run)) for run in runs]


def _inner_nodes(graph: Any) -> list[Any]:
    """The nodes with modules, each behind those that it takes its inputs from."""
    return [node for node in graph.node_list if node not in graph.in_nodes + graph.out_nodes + graph.condition_nodes]


def _is_single(node: Any) -> bool:
    """Whether a node has one input and one output."""
    return len(node.inputs) == 1 == len(node.outputs)


def _part(graph: Any, node: Any) -> Part:
    given = [c[0] if isinstance(c, tuple) else c for c in node.conditions]  # (node, 0) after 0.2
    conditions = tuple(map(graph.condition_nodes.index, given))
    return Part(f"node {node.name!r}", node.module, block_shape(node.module), conditions)


def _check_one_chain(flow: Any) -> None:
    """Raise ConversionError for a graph that is no chain from one input to one output."""
    if _is_sequence(flow):
        return
    if len(flow.in_nodes) != 1 or len(flow.out_nodes) != 1:
        raise ConversionError(f"a GraphINN with {len(flow.in_nodes)} inputs and {len(flow.out_nodes)} outputs")
    expected = flow.in_nodes[0]
    for node in [*_inner_nodes(flow), flow.out_nodes[0]]:
        if node.inputs != [(expected, 0)] or len(node.outputs) > 1:
            raise ConversionError(f"GraphINN's node {node.name!r} does not follow on {expected.name!r} alone")
        expected = node


def _in_one_context(parts: list[Part]) -> list[Part]:
    """The parts with the places of their conditions in the one context."""
    start, columns = 0, dict[int, range]()
    for index, width in _condition_widths(parts).items():
        columns[index] = range(start, start + width)
        start += width
    return [
        replace(p, context=ContextColumns(tuple(c for i in p.conditions for c in columns[i]), start)) for p in parts
    ]


def _fused(fused: Flow | OnChannels, parts: Sequence[Part]) -> nn.Module:
    """The flow as a FrEIA module with the conditions of its parts: those that have some have the same."""
    dims_c = next((part.module.dims_c for part in parts if part.module.dims_c), ())
    return FreiaLayer(fused, [parts[0].shape], dims_c)


def _base(flow: Any) -> Base:
    """N(0, I), of the shape that comes out; vectors stay vectors. Raises ConversionError for a graph that is no chain."""
    _check_one_chain(flow)
    shape = tuple(flow.shapes[0]) if _is_sequence(flow) else tuple(flow.in_nodes[0].output_dims[0])
    for part in _chains(flow)[0].parts:
        if len(shape) > 1:
            (shape,) = part.module.output_dims([shape])
    return Base(tuple(shape))


def _log_prob(flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    z, jac = _run(flow, x, context, rev=False)
    return jac + log_normal(z)


def _run(flow: Any, x: Tensor, context: Tensor | None, *, rev: bool) -> tuple[Tensor, Tensor]:
    _check_one_chain(flow)
    widths = _condition_widths(_chains(flow)[0].parts)
    n = max(1 + max(widths, default=-1), len(getattr(flow, "condition_nodes", ())))
    conditions = [x.new_zeros(len(x), 0)] * n
    if context is not None:
        for index, part in zip(widths, context.split(list(widths.values()), 1), strict=True):
            conditions[index] = part
    out, jac = flow(x, c=conditions, rev=rev)
    return (out if isinstance(out, Tensor) else out[0]), jac + x.new_zeros(len(x))


def _context_shape(parts: Sequence[Part]) -> Shape:
    """The shape of the conditions, concatenated."""
    part = next((part for part in parts if part.module.dims_c), None)
    return () if part is None else ((part.context or own_context(part.module)).width, *part.module.dims_c[0][1:])


def _is_sequence(flow: nn.Module) -> bool:
    """A SequenceINN, or a class made of it, and no GraphINN."""
    return any(kind.__name__ == "SequenceINN" for kind in type(flow).__mro__)


def _condition_widths(parts: Sequence[Part]) -> dict[int, int]:
    """Columns of each condition, in the order of their indices; raises ConversionError where they cannot be one context."""
    widths: dict[int, int] = {}
    pixels: Shape = ()
    for part in parts:
        for index, dims in zip(part.conditions, part.module.dims_c, strict=True):
            pixels = pixels if widths else tuple(dims[1:])
            if widths.setdefault(index, dims[0]) != dims[0] or tuple(dims[1:]) != pixels:
                raise ConversionError(
                    f"{part.name}: condition {index} of shape {tuple(dims)} does not fit beside the others in one context; "
                    "accelerate leaves the conditions as they are"
                )
    return dict(sorted(widths.items()))


def _put_in_sequence(flow: Any, parts: Sequence[Part], replacements: Sequence[Replacement]) -> None:
    """Replaces layers of a `SequenceINN`, which keeps conditions and shapes beside its modules."""
    conditions: list[int | None] = []
    stops = {start: stop for start, stop, _ in replacements}
    shapes, i = [flow.shapes[0]], 0
    while i < len(parts):
        stop = stops.get(i, i + 1)
        conditions.append(next((index for part in parts[i:stop] for index in part.conditions), None))
        shapes.append(flow.shapes[stop])
        i = stop
    flow.module_list = module_list(replaced([part.module for part in parts], replacements), flow.module_list)
    flow.conditions, flow.shapes = conditions, shapes


def _put_in_graph(flow: Any, run: Sequence[Any], replacements: Sequence[Replacement]) -> None:
    """Puts each fused module into that node of its run that is given the conditions; the others hand on what they get."""
    for start, stop, fused in replacements:
        holder = next((node for node in run[start:stop] if node.conditions), run[start])
        for node in run[start:stop]:
            node.module = fused if node is holder else PassedOn().train(fused.training)
    flow.module_list = module_list([node.module for node in _inner_nodes(flow)], flow.module_list)


LIBRARY = Library(
    package="FrEIA",
    flows=("SequenceINN", "GraphINN"),
    packages=("FrEIA.framework", "FrEIA.modules"),
    marks=("module_list",),
    chains=_chains,
    base=_base,
    log_prob=_log_prob,
    generate=lambda flow, noise, context: _run(flow, noise, context, rev=True)[0],
    kept=KeptBlock,
    fused=_fused,
    on_vectors=ON_VECTORS,
    on_images=ON_IMAGES,
    refused={
        **dict.fromkeys(("Split", "Concat"), "only one sample after the other can be converted"),
        **dict.fromkeys(
            ("InvAutoActFixed", "InvAutoActTwoSided", "InvAutoConv2D", "InvAutoFC"), "has no tractable log-determinant"
        ),
        "IResNetLayer": "its log-determinant is a random estimate",
    },
    own_hooks=frozenset({"OrthogonalTransform"}),  # re-orthogonalises a trained matrix; a matrix is read if it is not
    context_shape=_context_shape,
    in_one_context=_in_one_context,
    # The inverse of a rotation is its transpose, to float32.
    invertible=lambda parts, layers: not any(isinstance(layer, Dense) and not layer.trained for layer in layers),
)
