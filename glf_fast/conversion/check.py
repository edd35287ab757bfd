"""The proof of a conversion: the library's flow and ours, on the same random inputs, in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glf_fast.conversion.layers import Kept
from glf_fast.conversion.reading import ConversionError, Reading, parameters_of
from glf_fast.conversion.stack import Sources
from glf_fast.flow import Flow

__all__ = ["check", "proven"]

# Relative to the larger of 1 and the row's largest entry: float64 misses it by 1e-9, a wrong formula by far.
TOLERANCE = 1e-6
# What this relative change of the input changes is what float64 leaves open, with some digits to spare.
NUDGE = 1 + 1e-12
_BATCH = 16
_MISREAD = "Please report this flow: it is of a kind that was misread"

Build = Callable[[nn.Module], tuple[Reading, Flow, Sources]]


class Incomparable(ConversionError):
    """The library's flow gives nothing certain to compare with."""


def proven(library: nn.Module, build: Build) -> tuple[Reading, Flow]:
    """What `build` makes of the library's flow (float64), in eval mode, once it has stood two comparisons.

    The second is of copies whose fused parameters are a little off: fresh flows have last layers of zeros, which would
    hide what is made of their outputs. It shows besides which entries are functions of what the library trains: no
    others may be trained here.

    Raises ConversionError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the library calls and PyTorch has deprecated
        other = copy.deepcopy(library)  # before anything is called: some modules keep what cannot be copied
        reading, flow, sources = build(library)
        check(library.eval(), reading, flow.eval(), sources)
        _shake(other, library, parameters_of(*(value for _, value, _ in sources)))
        other_reading, other_flow, other_sources = build(other)
        with suppress(Incomparable):  # nobody's flow
            check(other.eval(), other_reading, other_flow.eval(), other_sources)
    if [value.shape for _, value, _ in sources] == [value.shape for _, value, _ in other_sources]:
        _compare_trained(flow, sources, other_sources)
    return reading, flow


def _shake(other: nn.Module, library: nn.Module, fused: set[int]) -> None:
    """Move the parameters of a copy that are fused, of which the originals' ids are given."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in library.named_parameters():
            if id(parameter) in fused:
                noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
                other.get_parameter(name).add_(noise, alpha=0.1 / fan_in**0.5)


def check(library: nn.Module, reading: Reading, flow: Flow, sources: Sources) -> None:
    """Raise ConversionError unless `flow` is the flow that was read: density, sampling, gradients.

    Compared in float64: log_prob; its gradient with respect to inputs and to every parameter that the library trains,
    taken back from our parameters to theirs by autograd; the inverse, or where the library has none, our inverse of our
    forward. The inputs are normal at several scales, and samples: what is far from the data of a trained flow says little
    about it. Inputs are left out where the library does not agree with itself: where 1e-12 more or less changes its result
    by more than the tolerance.

    Args:
        library: the flow that was read, in float64 and eval mode.
        reading: what it was read into.
        flow, sources: what `fuse` made of it, in eval mode.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = {name: p for name, p in library.named_parameters() if p.requires_grad and p.numel()}
    unused, uncertain = set(parameters), set(parameters)
    finite = compared = inverted = 0
    for scale in (0.05, 0.3, 1.0, 3.0, None):
        x, z = (scale or 1.0) * torch.randn(2, _BATCH, reading.dim, dtype=torch.float64, generator=generator)
        context = reading.contexts(_BATCH, generator)
        if scale is None:
            with torch.no_grad():
                x = flow.inverse(x, context)[0]
        try:
            wanted = _evaluate(reading.log_prob, x, context, parameters)
        except Exception as error:  # whatever a library raises outside of a bounded domain: its own samples are inside
            x, wanted = _evaluate_samples(reading, x, context, parameters, error)
        nudged = _evaluate(reading.log_prob, x * NUDGE, context, parameters)
        finite += int(wanted.log_prob.isfinite().sum())
        usable = _agree(wanted.log_prob, nudged.log_prob) & _agree(wanted.of_x, nudged.of_x)
        if not usable.any():
            continue
        if not usable.all():
            x, z, context = x[usable], z[usable], None if context is None else context[usable]
            wanted, nudged = (_evaluate(reading.log_prob, a, context, parameters) for a in (x, x * NUDGE))
        got = _evaluate(flow.log_prob, x, context, parameters, sources)
        _compare("log_prob", got.log_prob, wanted.log_prob)
        _compare("the gradient of log_prob with respect to x", got.of_x, wanted.of_x)
        for name in parameters:
            if _agree(wanted.of[name], nudged.of[name]).all():
                _compare(f"the gradient of log_prob with respect to {name}", got.of[name], wanted.of[name])
                uncertain.discard(name)
        unused -= wanted.used
        compared += len(x)
        with torch.no_grad():
            if reading.inverse is None:
                _compare_inverse(
                    "the inverse of the converted flow's forward", flow, flow(x, context)[0], context, (x, x)
                )
            else:
                truth = reading.inverse(z, context), reading.inverse(z * NUDGE, context)
                inverted += _compare_inverse("the inverse", flow, z, context, truth)
    if not compared or uncertain or (reading.inverse is not None and not inverted):
        why = "does not repeat itself to 1e-6" if finite else "is not finite"
        raise Incomparable(f"the library's own flow {why} on random inputs: there is nothing to compare with")
    if not reading.context_shape:
        kept = {id(p) for layer in reading.layers if isinstance(layer, Kept) for p in layer.module.parameters()}
        silent = [name for name in sorted(unused) if id(parameters[name]) in kept]
        if silent:
            raise ConversionError(
                f"{silent[0]} takes no part in log_prob(x): if the flow has a context, give an example of it: "
                "convert(flow, context=…)"
            )


@dataclass(frozen=True)
class _Evaluation:
    """log_prob (B, 1), its gradients with respect to x (B, D) and, summed over the rows, to each of the library's
    parameters, (1, n); the names of those that it is a function of.
    """

    log_prob: Tensor
    of_x: Tensor
    of: dict[str, Tensor]
    used: set[str]


def _evaluate(
    log_prob: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    context: Tensor | None,
    parameters: Mapping[str, nn.Parameter],
    sources: Sources | tuple[()] = (),
) -> _Evaluation:
    """With `sources`, gradients reach the library's parameters through ours; directly in the layers that are kept."""
    x = x.detach().requires_grad_()
    value = log_prob(x, context)
    theirs = list(parameters.values())
    ours = [(p, v) for p, v, _ in sources if p.requires_grad]
    of_x, *found = torch.autograd.grad(value.sum(), [x, *theirs, *(p for p, _ in ours)], allow_unused=True)
    direct, stacked = found[: len(theirs)], found[len(theirs) :]
    pairs = [(v, g) for (_, v), g in zip(ours, stacked, strict=True) if v.requires_grad and g is not None]
    through: tuple[Tensor | None, ...] = (None,) * len(theirs)
    if pairs and theirs:
        values, cotangents = zip(*pairs, strict=True)
        through = torch.autograd.grad(values, theirs, cotangents, allow_unused=True, retain_graph=True)
    of, used = {}, set()
    for (name, p), a, b in zip(parameters.items(), direct, through, strict=True):
        parts = [g for g in (a, b) if g is not None]
        of[name] = sum(parts, torch.zeros_like(p)).reshape(1, -1)
        used |= {name} if parts else set()
    return _Evaluation(value.detach()[:, None], of_x, of, used)


def _evaluate_samples(
    reading: Reading,
    noise: Tensor,
    context: Tensor | None,
    parameters: Mapping[str, nn.Parameter],
    error: Exception,
) -> tuple[Tensor, _Evaluation]:
    """Samples by the library itself, and their evaluation; raises ConversionError, with the first error, if that fails."""
    try:
        if reading.inverse is None:
            raise error
        with torch.no_grad():
            x = reading.inverse(noise, context)
        return x, _evaluate(reading.log_prob, x, context, parameters)
    except Exception:
        hint = "" if reading.context_shape else "; if it needs a context, give an example: convert(flow, context=…)"
        reason = f"{type(error).__name__} {error}".strip()
        raise ConversionError(f"the library's own flow fails on random inputs: {reason}{hint}") from error


def _compare_inverse(what: str, flow: Flow, z: Tensor, context: Tensor | None, truth: tuple[Tensor, Tensor]) -> int:
    """Compares with truth[0] and returns the number of rows compared.

    A trained flow may be so steep that float64 cannot invert it: what a nudge of z changes in ours, or in the library's
    inverse, truth[1], is allowed, too.
    """
    got, nudged = flow.inverse(z, context)[0], flow.inverse(z * NUDGE, context)[0]
    slack = (got - nudged).abs().amax(1) + (truth[0] - truth[1]).abs().amax(1)
    usable = slack.isfinite() & truth[0].isfinite().all(1)
    _compare(what, got[usable], truth[0][usable], slack[usable])
    return int(usable.sum())


def _compare_trained(flow: Flow, sources: Sources, others: Sources) -> None:
    """Whether each entry that is trained here is a function of what the library trains: whether it followed that."""
    names = {id(p): name for name, p in flow.named_parameters()}
    for (parameter, value, trained), (_, other, _) in zip(sources, others, strict=True):
        name = names[id(parameter)]
        # Of these only a triangle is read.
        if not name.endswith(("lower", "upper")) and bool((trained & (value == other)).any()):
            raise ConversionError(f"the converted flow would train what the original holds ({name}). {_MISREAD}")


def _agree(a: Tensor, b: Tensor, slack: Tensor | float = 0.0) -> Tensor:
    """Which rows of a (B, n) and b are equal, to the tolerance and `slack` (B,); where there are NaNs, they are not."""
    return (a - b).abs().amax(1) <= TOLERANCE * b.abs().amax(1).clamp(min=1) + slack


def _compare(what: str, got: Tensor, wanted: Tensor, slack: Tensor | float = 0.0) -> None:
    wrong = ~_agree(got, wanted, slack)
    if wrong.any():
        difference = (got - wanted)[wrong].abs().max().item()
        raise ConversionError(f"the converted flow is not the same: {what} differs by {difference:.3g}. {_MISREAD}")
