"""The proof of a conversion: the library's flow and the converted one, on the same random inputs, in float64."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from glf_fast.conversion.layers import ConversionError
from glf_fast.conversion.reading import Map, Reading, first_line, networks, parameters_of
from glf_fast.conversion.stack import Sources
from glf_fast.flow import Flow

__all__ = ["batch_size", "check", "proven"]

# Relative to the larger of 1 and the row's largest entry: float64 misses it by 1e-9, a wrong formula by far.
TOLERANCE = 1e-6
# A relative change of the input; what it changes is what float64 leaves open, with some digits to spare.
NUDGE = 1e-12
_BATCH = 16
_IMAGES = 4  # of which every pixel says as much
_SCALES = (1.0, 0.3, 3.0, None, 0.05)
_MISREAD = "Please report this flow: it is of a kind that was misread"
_EXAMPLE = "give an example: convert(flow, context=…)"

Build = Callable[[nn.Module], tuple[Reading, Flow, Sources]]


def batch_size(least: int, sizes: Sequence[int]) -> int:
    """A number of samples that none of their sizes equals: a value of each column must not pass for one of each sample."""
    return next(n for n in itertools.count(least) if n not in sizes)


class Incomparable(ConversionError):
    """The library's flow gives nothing certain to compare with."""


def proven(library: nn.Module, build: Build) -> tuple[Reading, Flow, list[str]]:
    """The result of `build` for the library's flow (float64), in eval mode, once it has stood two comparisons.

    Returns besides the names of the library's parameters that are `_reparametrised`.

    The second is of copies whose fused parameters are a little off: fresh flows have last layers of zeros, which would
    hide what is made of their outputs. It shows besides which entries are functions of what the library trains: no
    others may be trained in the converted flow.

    Raises ConversionError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the library calls and PyTorch has deprecated
        other = copy.deepcopy(library)  # before anything is called: some modules keep what cannot be copied
        reading, flow, sources = build(library)
        check(library.eval(), reading, flow.eval(), sources)
        fused = parameters_of(*(value for _, value, _ in sources))
        fused |= {id(p) for network in networks(reading.layers, kept=False) for p in network.parameters()}
        _shake(other, library, fused)
        other_reading, other_flow, other_sources = build(other)
        with suppress(Incomparable):  # nobody's flow
            check(other.eval(), other_reading, other_flow.eval(), other_sources, (1.0, 0.1))
    if [value.shape for _, value, _ in sources] == [value.shape for _, value, _ in other_sources]:
        _compare_trained(flow, sources, other_sources)
    changed = dict.fromkeys([*_reparametrised(library, sources), *_reparametrised(other, other_sources)])
    return reading, flow, list(changed)


def _shake(other: nn.Module, library: nn.Module, fused: set[int]) -> None:
    """Move the parameters of a copy of the library's flow whose originals have these ids."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in library.named_parameters():
            if id(parameter) in fused:
                noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                other.get_parameter(name).add_(noise, alpha=0.1 / fan_in**0.5)


def check(
    library: nn.Module, reading: Reading, flow: Flow, sources: Sources, scales: Sequence[float | None] = _SCALES
) -> None:
    """Raise ConversionError unless `flow` is the flow that was read: density, sampling, gradients.

    Compared in float64: log_prob; its gradient with respect to inputs and to every parameter that the library trains,
    taken back from the converted flow's parameters by autograd; the inverse, or where the library has none, the inverse
    of the converted flow's forward. A difference counts only where the library agrees with itself: where 1e-12 more or
    less of the input changes its own result by less than the tolerance.

    Args:
        library: the flow that was read, in float64 and eval mode.
        reading: what it was read into.
        flow, sources: the result of `fuse`, in eval mode.
        scales: of the normal inputs; None for samples. Inputs far from the data of a trained flow say little about it.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = {name: p for name, p in library.named_parameters() if p.requires_grad and p.numel()}
    shape = reading.event_shape
    sizes = (*shape, *(reading.context_shape or ()))
    n = batch_size(_BATCH if len(shape) == 1 else _IMAGES, sizes)
    theirs = partial(_evaluate, _on_rows(reading.log_prob, shape), parameters=parameters)
    ours = partial(_evaluate, _on_rows(flow.log_prob, shape), parameters=parameters, sources=sources)
    encode = _on_rows(lambda x, context: flow(x, context)[0], shape)
    decode = _on_rows(lambda z, context: flow.inverse(z, context)[0], shape)
    invert = None if reading.inverse is None else _on_rows(reading.inverse, shape)
    unused, uncertain = set(parameters), set(parameters)
    finite = compared = inverted = 0
    for scale in scales:
        x, z = (scale or 1.0) * torch.randn(2, n, math.prod(shape), dtype=torch.float64, generator=generator)
        context = reading.contexts(n, generator)
        if scale is None:
            with torch.no_grad():
                x = decode(x, context)
        try:
            wanted = theirs(x, context)
        except Exception as error:  # whatever a library raises outside of a bounded domain: its own samples are inside
            x, wanted = _evaluate_samples(reading, theirs, x, context, error)
        rows = torch.stack([value.isfinite().all(1) for value in wanted.each.values()]).all(0)
        finite += int(rows.sum())
        if not rows.any():
            continue
        if not rows.all():
            x, z, context = _select(rows, x, z, context)
            wanted = theirs(x, context)
        got, doubtful = ours(x, context), set[str]()
        if not wanted.agreeing(got).all() or wanted.differing(got):  # misread, or the library is not certain itself
            rows = wanted.agreeing(*(theirs(a, context) for a in _nudged(x)))
            if not rows.any():
                continue
            x, z, context = _select(rows, x, z, context)
            wanted, got = theirs(x, context), ours(x, context)
            doubtful = wanted.differing(*(theirs(a, context) for a in _nudged(x)))
        for what, value in wanted.each.items():
            _compare(what, got.each[what], value)
        for name in parameters:
            if name not in doubtful:
                _compare(f"the gradient of log_prob with respect to {name}", got.summed[name], wanted.summed[name])
        unused -= wanted.used
        uncertain &= doubtful
        compared += len(x)
        with torch.no_grad():
            if invert is None:
                what = "the inverse of the converted flow's forward"
                _compare_inverse(what, decode, lambda z, context, x=x: x, encode(x, context), context)  # type: ignore
            else:
                inverted += _compare_inverse("the inverse", decode, invert, z, context)
    if not compared or uncertain or (invert is not None and not inverted):
        why = "reproducible to 1e-6" if finite else "finite"
        raise Incomparable(f"the original flow is not {why} on random inputs, so the conversion cannot be verified")
    if not reading.context_shape:
        kept = {id(p) for network in networks(reading.layers) for p in network.parameters()}
        silent = [name for name in sorted(unused) if id(parameters[name]) in kept]
        if silent:
            raise ConversionError(f"{silent[0]} takes no part in log_prob(x): if the flow has a context, {_EXAMPLE}")


@dataclass(frozen=True)
class _Evaluation:
    """log_prob and its gradients."""

    each: dict[str, Tensor]  # of each sample: log_prob (B, 1), and its gradient with respect to x (B, D)
    summed: dict[str, Tensor]  # over the samples: the gradients with respect to the library's parameters, (1, n)
    used: set[str]  # names of the parameters that log_prob is a function of

    def agreeing(self, *others: _Evaluation) -> Tensor:
        """The samples (B,) for which all others have the same values."""
        pairs = [(truth, *(other.each[what] for other in others)) for what, truth in self.each.items()]
        return torch.stack([_agree(*pair) for pair in pairs]).all(0)

    def differing(self, *others: _Evaluation) -> set[str]:
        """The parameters for which some other has another gradient."""
        return {n for n, truth in self.summed.items() if not _agree(truth, *(o.summed[n] for o in others)).all()}


def _evaluate(
    log_prob: Map,
    x: Tensor,
    context: Tensor | None,
    parameters: Mapping[str, nn.Parameter],
    sources: Sources | tuple[()] = (),
) -> _Evaluation:
    """Gradients reach the library's parameters directly and, with `sources`, through the converted flow's."""
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
    parts = {
        name: [gradient for gradient in both if gradient is not None]
        for name, *both in zip(parameters, direct, through, strict=True)
    }
    summed = {
        name: (sum(parts[name][1:], parts[name][0]) if parts[name] else torch.zeros_like(p)).reshape(1, -1)
        for name, p in parameters.items()
    }
    each = {"log_prob": value.detach()[:, None], "the gradient of log_prob with respect to x": of_x}
    return _Evaluation(each, summed, {name for name, found in parts.items() if found})


def _evaluate_samples(
    reading: Reading, evaluate: Callable[..., _Evaluation], noise: Tensor, context: Tensor | None, error: Exception
) -> tuple[Tensor, _Evaluation]:
    """Samples by the library itself, and their evaluation; raises ConversionError, with the first error, if that fails."""
    try:
        if reading.inverse is None:
            raise error
        with torch.no_grad():
            x = _on_rows(reading.inverse, reading.event_shape)(noise, context)
        return x, evaluate(x, context)
    except Exception:
        hint = "" if reading.context_shape else f"; if it needs a context, {_EXAMPLE}"
        raise ConversionError(f"the library's own flow fails on random inputs: {first_line(error)}{hint}") from error


def _compare_inverse(what: str, decode: Map, inverse: Map, z: Tensor, context: Tensor | None) -> int:
    """Compares `decode` with the true `inverse`; returns the number of rows compared.

    A trained flow may be so steep that float64 cannot invert it: what a nudge of z changes in either is allowed, too.
    """
    got, truth = decode(z, context), inverse(z, context)
    usable = got.isfinite().all(1) & truth.isfinite().all(1)
    slack = torch.zeros(len(z), dtype=torch.float64)
    if not _agree(truth, got).all():
        for a in _nudged(z):
            slack += (decode(a, context) - got).abs().amax(1) + (inverse(a, context) - truth).abs().amax(1)
        usable = truth.isfinite().all(1) & slack.isfinite()
    _compare(what, got[usable], truth[usable], slack[usable])
    return int(usable.sum())


def _compare_trained(flow: Flow, sources: Sources, others: Sources) -> None:
    """Raise ConversionError for a trained entry that did not follow the library's: it is no function of what that trains."""
    names = {id(p): name for name, p in flow.named_parameters()}
    for (parameter, value, trained), (_, other, _) in zip(sources, others, strict=True):
        name = names[id(parameter)]
        # Only a triangle of these is read.
        if not name.endswith(("lower", "upper")) and bool((trained & (value == other)).any()):
            raise ConversionError(f"the converted flow would train what is frozen in the original ({name}). {_MISREAD}")


def _reparametrised(library: nn.Module, sources: Sources) -> list[str]:
    """Names of the library's parameters of which something else is trained than ± the entries themselves.

    An optimizer then takes other steps than with the original. With random cotangents r of all trained values, Jᵀr² equals
    ±(Jᵀr)² in the entries of which J holds a single ±1, and nowhere else. A value that is a sum of several parameters, as
    two biases make one, is known by J in the same way: an optimizer moves it twice.
    """
    generator = torch.Generator().manual_seed(0)
    used = parameters_of(*(value for _, value, _ in sources))
    parameters = {name: p for name, p in library.named_parameters() if id(p) in used}
    pairs = [
        (value, trained * torch.randn(value.shape, dtype=value.dtype, generator=generator))
        for _, value, trained in sources
        if value.requires_grad
    ]
    if not pairs or not parameters:
        return []
    values, r = zip(*pairs, strict=True)
    leaves = list(parameters.values())

    def pulled(cotangents: Sequence[Tensor], *, again: bool = False) -> Sequence[Tensor]:
        """Jᵀ times these."""
        found = torch.autograd.grad(
            values, leaves, cotangents, retain_graph=True, create_graph=again, materialize_grads=True
        )
        return found

    def single(once: Sequence[Tensor], squared: Sequence[Tensor]) -> list[Tensor]:
        return [torch.isclose(a**2, b.abs(), rtol=1e-6, atol=1e-9) for a, b in zip(once, squared, strict=True)]

    of_leaves = single(pulled(r), pulled([a**2 for a in r]))
    zeros = [torch.zeros_like(value, requires_grad=True) for value in values]
    linear = pulled(zeros, again=True)  # Jᵀ times variables: its gradient with respect to these is J times a tangent
    t = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in leaves]
    once, squared = (
        torch.autograd.grad(linear, zeros, [a**power for a in t], retain_graph=True, materialize_grads=True)
        for power in (1, 2)
    )
    sums = [(~entries).to(value) * (a != 0) for entries, value, a in zip(single(once, squared), values, r, strict=True)]
    in_sums = pulled(sums)
    return [
        name
        for name, entries, summed in zip(parameters, of_leaves, in_sums, strict=True)
        if not entries.all() or summed.any()
    ]


def _on_rows(function: Map, shape: tuple[int, ...]) -> Map:
    """A function of (B, *shape) as one of rows (B, n); its values become rows, too, or numbers (B,)."""

    def on_rows(x: Tensor, context: Tensor | None) -> Tensor:
        out = function(x.clone().reshape(-1, *shape), context)  # some libraries write to what they are given
        return out.flatten(1) if out.ndim > 1 else out

    return on_rows


def _nudged(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, D) with every entry a little larger or smaller, and the other way round."""
    places = torch.arange(len(x))[:, None] + torch.arange(x.shape[1])
    nudge = NUDGE * (1 - 2 * places.remainder(2)).to(x.dtype)
    return x * (1 + nudge), x * (1 - nudge)


def _select(rows: Tensor, x: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return x[rows], z[rows], None if context is None else context[rows]


def _agree(truth: Tensor, *others: Tensor, slack: Tensor | float = 0.0) -> Tensor:
    """The rows in which all others equal truth (B, n), to the tolerance and `slack` (B,); none with a NaN does."""
    allowed = TOLERANCE * truth.abs().amax(1).clamp(min=1) + slack
    return torch.stack([(other - truth).abs().amax(1) <= allowed for other in others]).all(0)


def _compare(what: str, got: Tensor, wanted: Tensor, slack: Tensor | float = 0.0) -> None:
    wrong = ~_agree(wanted, got, slack=slack)
    if wrong.any():
        difference = (got - wanted)[wrong].abs().max().item()
        raise ConversionError(f"the converted flow is not the same: {what} differs by {difference:.3g}. {_MISREAD}")
