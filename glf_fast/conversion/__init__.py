"""Flows of other libraries as ours: `convert` makes a new flow, with every run of layers that the kernels cover fused."""

from __future__ import annotations

import copy
from importlib import import_module

import torch
from torch import nn

from glf_fast.conversion.check import check
from glf_fast.conversion.embedded import Embedded
from glf_fast.conversion.fuse import fuse
from glf_fast.conversion.layers import Coupling, Kept
from glf_fast.conversion.reading import ConversionError
from glf_fast.flow import Flow

__all__ = ["ConversionError", "convert"]

# Top package of a flow's class → the module here that reads it. A library is imported by its own flows, never by us.
READERS = {"nflows": "nflows", "zuko": "zuko", "normflows": "normflows", "FrEIA": "freia"}


def convert(flow: nn.Module) -> Flow:
    """A flow of normflows, nflows, zuko or FrEIA as a `glf_fast.Flow`: the same density, several times faster.

    The flow may be trained or fresh, with context or without; it is not changed. The result is a `CouplingFlow`, or a
    `SequentialFlow` of those and of the library's own layers where a layer cannot be fused (splines, autoregressive
    layers, residual conditioners). It trains what the library's flow trains, and keeps dtype, device, `requires_grad`
    and train or eval mode. Constants are read from the object itself.

    Before it is returned it is compared with the original, in float64, on random inputs: log_prob, inverse, and the
    gradients of inputs and of all parameters, to 1e-6. The work is done in float64 on the processor.

    Raises ConversionError, with the layer and the reason: for flows of other libraries, on images, with another base
    than a (diagonal) normal, with no layer that can be fused, or with an ActNorm that has not seen a batch yet.

    Example:
        >>> fast = glf_fast.convert(zuko.flows.RealNVP(features=3, context=5, transforms=4))
        >>> fast.log_prob(torch.randn(7, 3), torch.randn(7, 5)).shape
        torch.Size([7])
    """
    name = type(flow).__name__
    packages = [kind.__module__.partition(".")[0] for kind in type(flow).__mro__]
    reader = next((READERS[package] for package in packages if package in READERS), None)
    if reader is None:
        raise ConversionError(
            f"{type(flow).__module__}.{name} is no flow of {', '.join(READERS)}: those libraries' flows are converted; "
            "for a flow inside another module there is glf_fast.accelerate"
        )
    like = next((p for p in flow.parameters()), torch.empty(0))
    try:
        original = copy.deepcopy(flow).to("cpu", torch.float64)
    except RuntimeError as error:  # a cache of tensors that are not leaves
        raise ConversionError(f"this {name} cannot be copied: {error}") from error
    with torch.enable_grad():
        reading = import_module(f"glf_fast.conversion.{reader}").read(original)
        couplings = [layer for layer in reading.layers if isinstance(layer, Coupling)]
        if not couplings:
            reasons = [layer.reason for layer in reading.layers if isinstance(layer, Kept)]
            raise ConversionError(f"{name} has no coupling that can be fused. " + "; ".join(reasons))
        context_dim = max(len(c.conditioner.weights[0]) - len(c.passive) for c in couplings)
        if reading.context_shape and reading.embedding is None:
            context_dim = reading.context_shape[0]
        converted, sources = fuse(reading.layers, reading.dim, context_dim)
        if reading.embedding is not None:
            converted = Embedded(converted, reading.embedding)
        check(original.eval(), reading, converted.eval(), sources)
    return converted.to(like.device, like.dtype).train(flow.training)
