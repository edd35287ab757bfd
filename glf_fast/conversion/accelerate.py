"""Fused flows inside any model: the library's objects stay, what is in them is replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from glf_fast.conversion.adapters import FusedLayer, PassedOn
from glf_fast.conversion.check import proven
from glf_fast.conversion.fuse import fuse
from glf_fast.conversion.images.modules import OnChannels
from glf_fast.conversion.layers import Coupling, Kept, Layer, NetworkCoupling, Unfusable
from glf_fast.conversion.places import Place, Replacement, Shape, is_layer, places_of
from glf_fast.conversion.reading import ConversionError, Reading, check_precision, copied, lost_in_training, read_parts
from glf_fast.conversion.stack import Sources
from glf_fast.flow import ActNorm, AffineCoupling, CouplingFlow, Flow, InvertibleLinear, SequentialFlow
from glf_fast.flow.folding import folded
from glf_fast.reference import log_normal

__all__ = ["Report", "accelerate"]


@dataclass(frozen=True)
class Replaced:
    """Layers `first` to `last` of the flow at `where` (their names, data → noise), and what they have become.

    `couplings`: how many they held; `flows`: how many CouplingFlows, one launch each, compute them now, or on images
    AffineCouplings, which is `kind`; `affine`: linear layers and ActNorms beside those, which fold into none of them;
    `lost`: what they did in training mode alone, dropout say, and no longer do.
    """

    where: str
    what: str
    first: str
    last: str
    couplings: int
    flows: int
    affine: int
    lost: str
    kind: str = "CouplingFlow"


@dataclass(frozen=True)
class Left:
    """A layer, or a whole flow, that stays as it is."""

    where: str
    what: str
    reason: str


@dataclass
class Report:
    """What `accelerate` did. `print(report)` shows it as a table; a report is true if anything was replaced."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        lines = []
        if self.replaced:
            rows = [("flow", "kind", "layers", "couplings", "fused into")]
            for r in self.replaced:
                layers = r.first if r.first == r.last else f"{r.first} … {r.last}"
                parts = [f"{r.flows} {r.kind}"] * bool(r.flows) + [f"{r.affine} affine"] * bool(r.affine)
                rows.append((r.where, r.what, layers, str(r.couplings), " + ".join(parts)))
            lines += ["Replaced:", *_table(rows)]
        else:
            lines.append("Nothing was replaced.")
        lines += [f"{r.where} has no {r.lost} in training mode any more." for r in self.replaced if r.lost]
        if self.left:
            lines += ["Left as they are:", *(f"  {x.where} ({x.what}): {x.reason}" for x in self.left)]
        elif not self.replaced:
            lines.append("There is no flow of normflows, nflows, zuko or FrEIA in this model.")
        if self.replaced:
            lines.append("An optimizer made before holds the old parameters: make it anew.")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Replace what can be fused in the flows of normflows, nflows, zuko and FrEIA anywhere in `model`, in place.

    The library's flow stays what it is, with its class, its base distribution and all its methods; every run of its
    layers that the kernels cover becomes one layer that computes the same. Each run is compared with the original in
    float64 before it is put in (forward, inverse, gradients of all parameters); one that differs is left alone. On images
    the networks stay the originals, and the layers around them are replaced, level by level in multi-scale flows.

    Dtype, device, train or eval mode and `requires_grad` stay as they were. Training goes on, with *new parameters*: make
    the optimizer after this call, and load checkpoints of the original before it, because the names in the state_dict are
    others. A layer whose parameters, or which itself, is used elsewhere in the model, too, stays as it is. Code that has the
    layers in a plain list of its own, though, goes on with the old ones: walk the flow's. Values between the layers of a
    replaced run, as FrEIA's `intermediate_outputs` gives them, are no longer there.

    Args:
        model: any module: a flow, or a model with flows in it. Changed in place. Of an sbi posterior give its
            `posterior_estimator`.

    Returns:
        Report: what was replaced, what not, and why; print it.

    Example:
        >>> report = accelerate(torch.nn.Linear(2, 2))
        >>> print(report)
        Nothing was replaced.
        There is no flow of normflows, nflows, zuko or FrEIA in this model.
    """
    _check_module(model)
    report = Report()
    seen: list[str] = []  # flows, and layers outside of flows, that are in the report
    for where, module in list(model.named_modules()):
        inside = any(not outer or where.startswith(f"{outer}.") for outer in seen)
        name, kind = where or "the model", type(module).__name__
        try:
            places = places_of(module)
        except ConversionError as reason:
            report.left.append(Left(name, kind, str(reason)))
            seen.append(where)
            continue
        if places:
            seen.append(where)
            before = len(report.replaced) + len(report.left)
            # Gradients are compared and graphs followed, wherever this is called.
            with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
                for place in places:
                    _accelerate_place(model, module, name, place, report)
            if len(report.replaced) + len(report.left) == before:
                report.left.append(Left(name, kind, "there is no coupling in it that could be fused"))
        elif is_layer(module) and not inside:
            seen.append(where)
            report.left.append(Left(name, kind, "not in a flow whose layers can be replaced"))
    return report


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        hint = ": give its posterior_estimator" if hasattr(model, "posterior_estimator") else ""
        raise TypeError(f"accelerate takes a torch.nn.Module; got {type(model).__name__}{hint}")


def _accelerate_place(model: nn.Module, flow: nn.Module, where: str, place: Place, report: Report) -> None:
    parts = _read(model, flow, place)
    replacements: list[Replacement] = []
    for start, stop in _runs(parts, place.conditions):
        names = [name for name, _ in place.named[start:stop]]
        modules = [module for _, module in place.named[start:stop]]
        couplings = sum(isinstance(layer, Coupling | NetworkCoupling) for part in parts[start:stop] for layer in part)
        if not couplings and not any(type(module).__name__ in place.alone for module in modules):
            continue
        try:
            fused = _fused(place, start, stop)
        except (Unfusable, ConversionError) as reason:
            report.left.append(Left(where, type(flow).__name__, f"{_span(names)}: {reason}"))
            continue
        flows, affine = _counts(fused)
        lost = lost_in_training(layer for part in parts[start:stop] for layer in part)
        kind = "AffineCoupling" if isinstance(fused, OnChannels) else "CouplingFlow"
        report.replaced.append(
            Replaced(where, type(flow).__name__, names[0], names[-1], couplings, flows, affine, lost, kind)
        )
        adapter = place.adapt(fused, modules)
        adapter.training = modules[0].training
        replacements.append((start, stop, adapter))
    for part in parts:
        for layer in part:
            if isinstance(layer, Kept):
                report.left.append(Left(where, type(flow).__name__, layer.reason))
    if replacements:
        place.put(replacements)


def _counts(fused: Flow | OnChannels) -> tuple[int, int]:
    """How many CouplingFlows there are, or AffineCouplings on images, and affine maps beside them."""
    if isinstance(fused, OnChannels):
        steps = folded(fused.layers, inverse=False)
        couplings = sum(isinstance(step, AffineCoupling) for step in steps)
        return couplings, len(steps) - couplings
    modules = list(fused.modules())
    flows = sum(isinstance(module, CouplingFlow) for module in modules)
    return flows, sum(isinstance(module, ActNorm | InvertibleLinear) for module in modules)


def _read(model: nn.Module, flow: nn.Module, place: Place) -> list[list[Layer]]:
    """The layers of each module, with `Kept` for what stays."""

    def read(module: nn.Module) -> list[Layer]:
        if isinstance(module, FusedLayer | PassedOn):
            raise Unfusable("fused before")
        for part in module.modules():
            # FrEIA's own hook re-orthogonalises a matrix that is trained, and is read only where it is not.
            own = type(part).__name__ == "OrthogonalTransform"
            on_parameters = any(
                p._backward_hooks or p._post_accumulate_grad_hooks for p in part.parameters(recurse=False)
            )
            if part._forward_hooks or part._forward_pre_hooks or (part._backward_hooks and not own) or on_parameters:
                raise Unfusable("has hooks, which would no longer run")
        if _used_elsewhere(model, flow, module):
            raise Unfusable("used elsewhere in the model, too: a copy would not stay equal")
        try:
            return place.read(module, of[id(module)])
        except ConversionError as reason:  # a reason against the whole flow is one against this layer here
            raise Unfusable(str(reason)) from reason

    of = {id(module): shape for (_, module), shape in zip(place.named, place.shapes, strict=True)}
    device = next((p.device.type for p in flow.parameters()), "cpu")
    return read_parts(place.named, read, lambda module: module, device)


def _runs(parts: Sequence[Sequence[Layer]], conditions: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Longest ranges of modules that are all read, and of which those with conditions have the same ones."""
    start = 0
    given: tuple[int, ...] = ()
    for i, part in enumerate(parts):
        kept = any(isinstance(layer, Kept) for layer in part)
        if kept or (conditions[i] and given and conditions[i] != given):
            if start < i:
                yield start, i
            start, given = (i + 1, ()) if kept else (i, ())
        if not kept and conditions[i]:
            given = conditions[i]
    if start < len(parts):
        yield start, len(parts)


def _fused(place: Place, start: int, stop: int) -> Flow | OnChannels:
    """Those modules as one flow of ours, compared with copies of them in float64, with their dtype, device and mode.

    A network that stays is the original itself, with its parameters, buffers, hooks and modes.
    """
    modules = [module for _, module in place.named[start:stop]]
    like = next(p for module in modules for p in module.parameters() if p.is_floating_point())
    check_precision(like.dtype)
    copies = copied(nn.ModuleList(modules)).cpu().double().eval()
    for module in copies.modules():
        if hasattr(module, "using_cache"):
            module.using_cache = False  # type: ignore[assignment]  # what it holds is of the original, in another dtype

    def build(event_shape: Shape, copied: nn.Module) -> tuple[Reading, Flow, Sources]:
        modules: list[nn.Module] = list(copied.children())
        shapes = place.shapes[start:stop]
        layers = [layer for module, shape in zip(modules, shapes, strict=True) for layer in place.read(module, shape)]
        context_shape = place.context_shape(modules, event_shape)
        columns = max((layer.context_dim() for layer in layers if isinstance(layer, Coupling)), default=0)
        if columns:
            context_shape = (columns,)
        chain = [place.keep(module) for module in modules]

        def log_prob(x: Tensor, context: Tensor | None) -> Tensor:
            logdet = x.new_zeros(len(x))
            for module in chain:
                x, ldj = module(x, context)
                logdet = logdet + ldj
            return logdet + log_normal(x)

        def inverse(z: Tensor, context: Tensor | None) -> Tensor:
            for module in reversed(chain):
                z, _ = module.inverse(z, context)  # type: ignore[operator]
            return z

        reading = Reading(
            layers, event_shape, log_prob, inverse if place.has_inverse(modules, layers) else None,
            context_shape=context_shape,
        )  # fmt: skip
        return reading, *fuse(layers, event_shape, context_shape)

    *cheaper, own = place.check_shapes(place.shapes[start])
    for event_shape in cheaper:
        with suppress(Unfusable, ConversionError):
            _, fused = proven(copies, partial(build, event_shape))
            break
    else:
        _, fused = proven(copies, partial(build, own))
    fused = fused.to(like.device, like.dtype).train(modules[0].training)
    _restore(fused, dict(zip(copies.modules(), nn.ModuleList(modules).modules(), strict=True)))
    # What says no shape takes any number of pixels.
    return OnChannels(fused.layers) if isinstance(fused, SequentialFlow) and len(fused.event_shape) == 3 else fused


def _restore(fused: nn.Module, originals: Mapping[nn.Module, nn.Module]) -> None:
    """Put originals in the places of their copies."""
    for module in list(fused.modules()):
        for name, child in module._modules.items():
            if child is not None and child in originals:
                module._modules[name] = originals[child]


def _used_elsewhere(model: nn.Module, flow: nn.Module, layer: nn.Module) -> bool:
    """Whether a parameter of the layer can be reached in another way than through the flow's list of layers."""
    own = {id(p) for p in layer.parameters()}
    seen: set[tuple[int, bool]] = set()
    todo = [(model, model is flow)]
    while todo:
        module, inside = todo.pop()
        if (id(module), inside) in seen:
            continue
        seen.add((id(module), inside))
        if any(id(p) in own for p in module._parameters.values()):
            return True
        in_list = inside and isinstance(module, nn.ModuleList)
        for name, child in module._modules.items():
            in_place = in_list or (module is flow and name in ("_transform", "transform"))
            if child is not None and not (child is layer and in_place):
                todo.append((child, inside or child is flow))
    return False


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
