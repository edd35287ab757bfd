"""Fused flows inside any model: the library's objects stay, what is in them is replaced."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.chains import Chain, Part, Replacement, Shape
from glf_fast.conversion.check import batch_size, proven
from glf_fast.conversion.fuse import fuse
from glf_fast.conversion.images import OnChannels
from glf_fast.conversion.layers import ConversionError, Coupling, Kept, Layer, Transform, Unfusable
from glf_fast.conversion.libraries import NAMES, host_of, is_layer
from glf_fast.conversion.library import Library, Unpacked
from glf_fast.conversion.padding import only_permutes
from glf_fast.conversion.reading import (
    Reading,
    check_modes,
    check_precision,
    copied,
    for_device,
    fused_context,
    lost_in_training,
    on_processor,
    read_parts,
    reason_of,
)
from glf_fast.conversion.stack import Sources
from glf_fast.flow import (
    ActNorm,
    AffineCoupling,
    AutoregressiveFlow,
    CouplingFlow,
    FixedLinear,
    Flow,
    InvertibleLinear,
    SequentialFlow,
    SplineCoupling,
)
from glf_fast.flow.folding import folded

__all__ = ["Report", "accelerate"]

_LONG = 5.0  # seconds


@dataclass(frozen=True)
class Replaced:
    """Layers `first` to `last` (their names, data → noise) of a flow, and what they have become."""

    where: str  # the flow's name in the model
    what: str  # its class
    first: str
    last: str
    couplings: int  # in those layers, and autoregressive ones
    # What computes them now, and how many: CouplingFlows and AutoregressiveFlows, one launch each, or couplings with the
    # library's own networks; and "affine", linear layers and ActNorms beside those, which fold into none of them.
    into: dict[str, int]
    lost: str  # what they did in training mode alone, dropout say, and no longer do
    reparametrised: (
        str  # classes of layers of which other parameters are trained, to which an optimizer takes other steps
    )

    @property
    def flows(self) -> int:
        """How many launches, or couplings, compute them."""
        return sum(self.into.values()) - self.into["affine"]


@dataclass(frozen=True)
class Left:
    """A layer, or a whole flow, that stays as it is."""

    where: str
    what: str
    reason: str


@dataclass
class Report:
    """The result of `accelerate`. `print(report)` shows it as a table; a report is true if anything was replaced."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        rows = [("flow", "kind", "layers", "transforms", "fused into")]
        for r in self.replaced:
            parts = [f"{number} {name}" for name, number in r.into.items() if number]
            rows.append((r.where, r.what, _span(r.first, r.last), str(r.couplings), " + ".join(parts)))
        lines = ["Replaced:", *_table(rows)] if self.replaced else ["Nothing was replaced."]
        lines += [f"{r.where} no longer applies {r.lost} in training mode." for r in self.replaced if r.lost]
        lines += [
            f"{where} trains other parameters for {kinds}: optimizers take other steps than in the original."
            for where, kinds in dict.fromkeys((r.where, r.reparametrised) for r in self.replaced if r.reparametrised)
        ]
        if self.left:
            lines += ["Left as they are:", *(f"  {x.where} ({x.what}): {x.reason}" for x in self.left)]
        elif not self.replaced:
            lines.append(f"There is no flow of {NAMES} in this model.")
        if self.replaced:
            lines.append("Optimizers created before this call still hold the old parameters; recreate them.")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Replace what can be fused in the flows of normflows, nflows, zuko, pyro and FrEIA anywhere in `model`, in place.

    The library's flow keeps its class, its base distribution and all its methods; every run of its layers that the
    kernels cover becomes one layer that computes the same. Each run is compared with the original in float64 before it is
    put in (forward, inverse, gradients of all parameters); one that differs is left alone. On images the networks stay the
    originals, and the layers around them are replaced, level by level in multi-scale flows.

    Steps of the two Glows that are copied most, which are in no package, are replaced likewise (`glow_modules`).

    Dtype, device, train or eval mode and `requires_grad` stay as they were. Training goes on, with *new parameters*: create
    the optimizer after this call, and load checkpoints of the original before it, because the names in the state_dict
    change. An optimizer takes the same steps as in the original, but for the layers that the report names. A layer that, or
    whose parameters, the model uses elsewhere, too, stays as it is. A plain list of layers outside the flow keeps the old
    ones. Values between the layers of a replaced run, as FrEIA's `intermediate_outputs` gives them, are lost.

    Args:
        model: any module: a flow, or a model with flows in it. Changed in place. Of an sbi posterior give its
            `posterior_estimator`.

    Returns:
        Report: what was replaced, what not, and why; print it.

    Example:
        >>> report = accelerate(torch.nn.Linear(2, 2))
        >>> print(report)
        Nothing was replaced.
        There is no flow of normflows, nflows, zuko, pyro or FrEIA in this model.
    """
    if not isinstance(model, nn.Module):
        hint = ": give its posterior_estimator" * hasattr(model, "posterior_estimator")  # type: ignore[unreachable]
        raise TypeError(f"accelerate takes a torch.nn.Module; got {type(model).__name__}{hint}")
    report = Report()
    reported: list[str] = []  # names of flows, and of layers outside of flows
    for where, module in list(model.named_modules()):
        inside = any(not outer or where.startswith(f"{outer}.") for outer in reported)
        name, kind = where or "the model", type(module).__name__
        try:
            host = host_of(module)
        except Exception as error:  # of a property with the name of a library's attribute
            reported.append(where)
            report.left.append(Left(name, kind, reason_of(error)))
            continue
        if host is not None and inside and host[1].__name__ in host[0].compositions:
            continue  # part of a flow that was dealt with
        if host is not None:
            library, base = host
            reported.append(where)
            before = len(report.replaced) + len(report.left)
            try:
                _check_methods(type(module), base, library)
                with on_processor(), _patience(name, kind):
                    if not library.owns(base):
                        _check_copy(module, library)
                    for chain in library.chains(module):
                        _accelerate_chain(model, module, name, library, chain, report)
            except Exception as error:  # a graph, or a class, that is made in another way than is known
                report.left.append(Left(name, kind, reason_of(error)))
            if len(report.replaced) + len(report.left) == before:
                report.left.append(
                    Left(name, kind, "there is no coupling or autoregressive layer in it that could be fused")
                )
        elif is_layer(module) and not inside:
            reported.append(where)
            report.left.append(Left(name, kind, "not in a flow whose layers can be replaced"))
    return report


@contextmanager
def _patience(where: str, what: str) -> Iterator[None]:
    """A line on stderr where the block takes long, so that nobody thinks that it hangs."""
    line = f"glf_fast: comparing the layers of {where} ({what}) with the fused ones; deep flows take up to a minute"
    timer = threading.Timer(_LONG, print, (line,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_methods(kind: type, base: type, library: Library) -> None:
    """Raise ConversionError if a class from elsewhere has replaced methods of the library's class `base`."""
    names = {name for name in dir(base) if name == "forward" or not hasattr(nn.Module, name)}
    elsewhere = [vars(k) for k in kind.__mro__ if k is not base and issubclass(k, base) and not library.owns(k)]
    changed = sorted(names & {name for own in elsewhere for name in own if callable(own[name])})
    if changed:
        raise ConversionError(
            f"{kind.__name__} has its own {', '.join(changed)}, which may read the layers: give convert the flow, or move "
            "them to a module around it"
        )


def _check_copy(flow: nn.Module, library: Library) -> None:
    """Raise ConversionError where a copy of a library's class does with its layers what the class of its name does not.

    The layers are compared before they are replaced; this compares the whole density, of a copy of the flow.
    """
    original, trial = (copied(flow).cpu().double().eval() for _ in range(2))
    library.prepare(original)
    library.prepare(trial)
    chains = library.chains(trial)
    columns = fused_context(layer for part in _read(trial, trial, library, chains[0].parts) for layer in part)
    for chain in chains:
        _accelerate_chain(trial, trial, "", library, chain, Report())
    generator = torch.Generator().manual_seed(0)
    shapes = library.chains(original)[0].parts[0].shape, (columns,)
    n = batch_size(8, (*shapes[0], columns))
    x, context = (torch.randn(n, *shape, dtype=torch.float64, generator=generator) for shape in shapes)
    with torch.no_grad():
        wanted, got = (library.log_prob(f, x, context if columns else None) for f in (original, trial))
    if not torch.allclose(got, wanted, rtol=1e-6, atol=1e-6):
        raise ConversionError("has another density with fused layers: it is no copy of the class whose name it has")


def _accelerate_chain(
    model: nn.Module, flow: nn.Module, where: str, library: Library, chain: Chain, report: Report
) -> None:
    """Replace the runs of a chain's layers that can be fused; `where` is the flow's name in the report."""
    found = _read(model, flow, library, chain.parts)
    what = type(flow).__name__
    replacements: list[Replacement] = []
    for start, stop in _runs(found, chain.parts):
        parts = chain.parts[start:stop]
        layers = [layer for part in found[start:stop] for layer in part]
        couplings = sum(isinstance(layer, Transform) for layer in layers)
        if not couplings and not any(type(part.module).__name__ in library.alone for part in parts):
            continue
        names = parts[0].name, parts[-1].name
        try:
            fused, changed = _fused(library, parts)
        except Exception as error:  # a proof calls whatever classes, of whatever version, have in their methods
            report.left.append(Left(where, what, f"{_span(*names)}: {reason_of(error)}"))
            continue
        adapter = library.fused(fused, parts)
        report.replaced.append(
            Replaced(where, what, *names, couplings, _counts(fused), lost_in_training(layers), changed)
        )
        adapter.training = parts[0].module.training
        replacements.append((start, stop, adapter))
    report.left += [Left(where, what, layer.reason) for part in found for layer in part if isinstance(layer, Kept)]
    if replacements:
        chain.put(replacements)


def _counts(fused: Flow | OnChannels) -> dict[str, int]:
    """What is in it, by kind, see `Replaced`."""
    kinds = (CouplingFlow, AutoregressiveFlow, AffineCoupling, SplineCoupling)
    counts = {kind.__name__: sum(isinstance(module, kind) for module in fused.modules()) for kind in kinds}
    if isinstance(fused, OnChannels):
        return {**counts, "affine": len(folded(fused.layers, inverse=False)) - sum(counts.values())}
    affine = sum(isinstance(module, ActNorm | InvertibleLinear | FixedLinear) for module in fused.modules())
    return {**counts, "affine": affine}


def _read(model: nn.Module, flow: nn.Module, library: Library, parts: Sequence[Part]) -> list[list[Layer]]:
    """The layers of each part, with `Kept` for what stays."""

    def read(part: Part) -> list[Layer]:
        for module in part.module.modules():
            hooks: list[Any] = [module._forward_hooks, module._forward_pre_hooks, module._backward_pre_hooks]
            if type(module).__name__ not in library.own_hooks:
                hooks.append(module._backward_hooks)
            for p in module.parameters(recurse=False):
                hooks += [p._backward_hooks, p._post_accumulate_grad_hooks]
            if any(hooks):
                raise Unfusable("has hooks, which would no longer run")
        if _used_elsewhere(model, flow, part):
            raise Unfusable("used elsewhere in the model, too: a copy would not stay equal")
        try:
            return library.read(part)
        except ConversionError as reason:  # a reason against the whole flow is one against this layer here
            raise Unfusable(str(reason)) from reason

    device = next((p.device.type for p in flow.parameters()), "cpu")
    return read_parts(library, parts, device, read=read)


def _runs(found: Sequence[Sequence[Layer]], parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """Longest ranges of parts without a kept layer, and of which those with conditions have the same ones."""
    start = 0
    given: tuple[int, ...] = ()
    for i, (layers, part) in enumerate(zip(found, parts, strict=True)):
        kept = any(isinstance(layer, Kept) for layer in layers)
        if kept or (part.conditions and given and part.conditions != given):
            if start < i:
                yield start, i
            start, given = (i + 1, ()) if kept else (i, ())
        if not kept and part.conditions:
            given = part.conditions
    if start < len(parts):
        yield start, len(parts)


def _fused(library: Library, parts: Sequence[Part]) -> tuple[Flow | OnChannels, str]:
    """A flow of those parts, proven on copies of them in float64, with their dtype, device and mode.

    Returns besides the classes of the parts of which other parameters are trained. A network that stays is the original itself,
    with its parameters, buffers, hooks and modes.
    """
    modules = nn.ModuleList(part.module for part in parts)
    like = next(p for p in modules.parameters() if p.is_floating_point())
    check_precision(like.dtype)
    copies = copied(modules).cpu().double()  # in their modes: a network with active dropout is read in another way
    library.prepare(copies)
    shape, device = parts[0].shape, like.device.type
    found = None
    if len(shape) == 3 and library.any_size and shape[1] * shape[2] > 100:
        with suppress(Unfusable, ConversionError):  # a few pixels say as much as many, where the networks take them
            found = proven(copies, partial(_build, library, parts, (shape[0], 4, 6), device))
    reading, fused, changed = found or proven(copies, partial(_build, library, parts, shape, device))
    check_modes(reading.layers, modules[0].training)
    kinds = {type(parts[int(name.partition(".")[0])].module).__name__ for name in changed}
    fused = fused.to(like.device, like.dtype).train(modules[0].training)
    originals = dict(zip(copies.modules(), modules.modules(), strict=True))
    for module in list(fused.modules()):
        for name, child in module._modules.items():
            if child in originals:
                module._modules[name] = originals[child]
    result: Flow | OnChannels = fused
    if isinstance(fused, SequentialFlow) and len(fused.event_shape) == 3:
        result = OnChannels(fused.layers)  # has no event_shape: it takes any number of pixels
    return result, ", ".join(sorted(kinds))


def _build(
    library: Library, originals: Sequence[Part], event_shape: Shape, device: str, copies: nn.Module
) -> tuple[Reading, Flow, Sources]:
    """Copies of parts, in float64, read and fused for that type of device."""
    parts = [replace(part, module=copy) for part, copy in zip(originals, copies.children(), strict=True)]
    read = [layer for part in parts for layer in library.read(part)]
    layers = for_device(read, device, only_permutes(read))
    columns = fused_context(layers)
    context_shape: Shape = (columns,) if columns else ()
    if not columns and any(isinstance(layer, Coupling) and not layer.is_mlp for layer in layers):
        context_shape = library.context_shape([replace(part, shape=event_shape) for part in parts])
    chain = SequentialFlow(map(library.keep, parts), event_shape, context_shape=context_shape)

    def inverse(z: Tensor, context: Tensor | None) -> Tensor:
        return chain.inverse(z, context)[0]

    invert = inverse if library.invertible(parts, layers) else None
    reading = Reading(layers, event_shape, chain.log_prob, invert, context_shape=context_shape)
    return reading, *fuse(layers, event_shape, context_shape)


def _used_elsewhere(model: nn.Module, flow: nn.Module, part: Part) -> bool:
    """True if a parameter of the layer can be reached in another way than through the flow's list of layers."""
    named = dict(model.named_modules(remove_duplicate=False))
    flows = tuple(f"{name}." if name else "" for name, module in named.items() if module is flow)
    own = {id(p) for p in part.module.parameters()}
    places = []
    for name, module in named.items():
        holder, _, last = name.rpartition(".")
        listed = isinstance(named.get(holder), nn.ModuleList | Unpacked)
        listed = listed or (named.get(holder) is flow and last == part.name)
        if module is part.module and name.startswith(flows) and listed:
            places.append(f"{name}.")
    return any(
        id(p) in own and not name.startswith(tuple(places))
        for name, p in model.named_parameters(remove_duplicate=False)
    )


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} … {last}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
