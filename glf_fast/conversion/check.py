"""The proof of a conversion: the library's flow and ours, on the same random inputs, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glf_fast.conversion.reading import ConversionError, Reading
from glf_fast.conversion.stack import Sources
from glf_fast.flow import Flow

__all__ = ["check"]

# Relative to the larger of 1 and the largest entry: float64 misses it by 1e-9, a wrong formula by far.
TOLERANCE = 1e-6
_BATCH = 16


def check(library: nn.Module, reading: Reading, flow: Flow, sources: Sources) -> None:
    """Raise ConversionError unless `flow` is the flow that was read: density, sampling, gradients.

    Compared in float64: log_prob; its gradient with respect to inputs and to every parameter that the library trains,
    taken back from our parameters to theirs by autograd; the inverse; our inverse of our forward. The inputs are normal
    at three scales, and samples: what is far from the data of a trained flow says little about it.

    Args:
        library: the flow that was read, in float64 and eval mode.
        reading: what it was read into.
        flow, sources: what `fuse` made of it, in eval mode.
    """
    generator = torch.Generator().manual_seed(0)
    compared = 0
    parameters = [(name, p) for name, p in library.named_parameters() if p.requires_grad]
    for scale in (0.3, 1.0, 3.0, None):
        x = torch.randn(_BATCH, reading.dim, dtype=torch.float64, generator=generator)
        context = None
        if reading.context_shape:
            context = torch.randn(_BATCH, *reading.context_shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            x = flow.inverse(x, context)[0] if scale is None else scale * x
        try:
            log_prob = reading.log_prob(x, context)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise ConversionError(f"the library's own flow fails on random inputs: {error}") from error
        usable = log_prob.isfinite()  # unbounded scales overflow far from the data, in the library too
        x, context = x[usable].requires_grad_(), None if context is None else context[usable]
        if not len(x):
            continue
        wanted = reading.log_prob(x, context)
        got = flow.log_prob(x, context)
        _compare("log_prob", got, wanted)
        _compare_gradients(x, wanted, got, parameters, sources)
        with torch.no_grad():
            z, _ = flow(x, context)
            _compare_inverse("the inverse of the converted flow's forward", flow, z, context, x)
            if reading.inverse is not None:
                z = torch.randn(len(x), reading.dim, dtype=torch.float64, generator=generator)
                _compare_inverse("the inverse", flow, z, context, reading.inverse(z, context))
        compared += len(x)
    if not compared:
        raise ConversionError("the library's own flow is not finite on random inputs: there is nothing to compare with")


def _compare_inverse(what: str, flow: Flow, z: Tensor, context: Tensor | None, wanted: Tensor) -> None:
    """A trained flow may be so steep that float64 cannot invert it: what a change of z by 1e-12 does is allowed, too."""
    usable = wanted.isfinite().all(1)
    if not usable.any():
        return
    z, wanted, context = z[usable], wanted[usable], None if context is None else context[usable]
    got, _ = flow.inverse(z, context)
    steepness = max((flow.inverse(z * (1 + e), context)[0] - got).abs().max().item() for e in (1e-12, -1e-12))
    _compare(what, got, wanted, slack=steepness)


def _compare_gradients(
    x: Tensor, wanted: Tensor, got: Tensor, parameters: list[tuple[str, nn.Parameter]], sources: Sources
) -> None:
    originals = [p for _, p in parameters]
    wanted_x, *wanted_p = torch.autograd.grad(wanted.sum(), [x, *originals], allow_unused=True)
    ours = [(p, value) for p, value in sources if p.requires_grad]
    # Layers that are kept still own the library's parameters: their gradients come directly.
    got_x, *gradients = torch.autograd.grad(got.sum(), [x, *originals, *(p for p, _ in ours)], allow_unused=True)
    _compare("the gradient of log_prob with respect to x", got_x, wanted_x)
    direct, stacked = gradients[: len(originals)], gradients[len(originals) :]
    pairs = [(value, g) for (_, value), g in zip(ours, stacked, strict=True) if value.requires_grad and g is not None]
    through: tuple[Tensor | None, ...] = (None,) * len(originals)
    if pairs and originals:
        values, cotangents = zip(*pairs, strict=True)
        through = torch.autograd.grad(values, originals, cotangents, allow_unused=True, retain_graph=True)
    for (name, parameter), a, b, w in zip(parameters, direct, through, wanted_p, strict=True):
        zero = torch.zeros_like(parameter)
        total = (zero if a is None else a) + (zero if b is None else b)
        _compare(f"the gradient of log_prob with respect to {name}", total, zero if w is None else w)


def _compare(what: str, got: Tensor, wanted: Tensor, slack: float = 0.0) -> None:
    difference = (got - wanted).abs().max().item()
    allowed = TOLERANCE * max(1.0, wanted.abs().max().item()) + slack
    if not difference <= allowed:  # nan is not
        raise ConversionError(
            f"the converted flow is not the same: {what} differs by {difference:.3g} ({allowed:.3g} is allowed). "
            "Please report this flow: it is of a kind that was misread"
        )
