"""Flows of other libraries: `convert` makes a new flow, with every run of layers that the kernels cover fused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from glf_fast.conversion.check import proven
from glf_fast.conversion.fuse import fuse
from glf_fast.conversion.layers import ConversionError, Kept, Transform
from glf_fast.conversion.libraries import library_of
from glf_fast.conversion.reading import (
    Reading,
    check_modes,
    check_precision,
    copied,
    lost_in_training,
    on_processor,
    read_flow,
)
from glf_fast.conversion.stack import Sources
from glf_fast.flow import Embedded, Flow

__all__ = ["ConversionError", "convert"]


def convert(flow: nn.Module, context: Tensor | None = None) -> Flow:
    """A flow of normflows, nflows, zuko, pyro or FrEIA as a `glf_fast.Flow`: the same density, several times faster.

    The flow may be trained or fresh, with context or without; it is not changed. The result is a `CouplingFlow`, an
    `AutoregressiveFlow`, or a `SequentialFlow` of those and of the library's own layers where a layer cannot be fused. On
    images the networks stay the library's (copies), and everything else becomes one operation a coupling and one product
    between two; noise of another shape, squeezed, flat or of several scales, gets the data's.

    The result trains what the library's flow trains (a matrix made of fewer numbers than it has entries, as nflows' QR
    and SVD, becomes free), and keeps dtype, device, `requires_grad` and train or eval mode. Constants are read from the
    object itself. FrEIA's conditions become one context: those that some block uses, by their index, side by side.

    Before it is returned it is compared with the original, in float64 on the processor, on random inputs: log_prob,
    inverse, and the gradients of inputs and of all parameters, to 1e-6.

    Args:
        flow: a flow of one of these libraries, on vectors or images (C, H, W).
        context: an example (B, …) of its context, one row or more, with which the two flows are compared. Needed only
            where no layer of the flow says what a context is: an embedding net that starts with a convolution, or that
            takes classes, or a network of one's own on images.

    Raises ConversionError, with the layer and the reason: for flows of other libraries, with another base than a (diagonal)
    normal, with no layer that can be fused, or with an ActNorm that has not seen a batch yet. Warns where the
    original does something in training mode, such as batch norm, that the result does not.

    Example:
        >>> fast = glf_fast.convert(zuko.flows.RealNVP(features=3, context=5, transforms=4))
        >>> fast.log_prob(torch.randn(7, 3), torch.randn(7, 5)).shape
        torch.Size([7])
    """
    library = library_of(flow)
    if context is not None and (context.ndim < 2 or not len(context)):
        raise ValueError(f"context must be an example of shape (batch, …); got {tuple(context.shape)}")
    like = next((p for p in flow.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    check_precision(like.dtype)

    def build(original: nn.Module) -> tuple[Reading, Flow, Sources]:
        reading = read_flow(library, original, like.device.type)
        if context is not None:
            example = context.detach().to("cpu", torch.float64 if context.is_floating_point() else context.dtype)
            reading = replace(reading, context_shape=tuple(context.shape[1:]), example=example)
        return reading, *_converted(type(flow).__name__, original, reading)

    with on_processor():
        original = copied(flow).to("cpu", torch.float64)
        modes = [(module, module.training) for module in original.modules()]
        reading, converted, _ = proven(original, build)
        check_modes(reading.layers, flow.training)
        lost = lost_in_training(reading.layers)
        if lost:
            warnings.warn(
                f"the converted flow does not apply {lost} in training mode; it always behaves as in eval mode",
                stacklevel=2,
            )
        converted.to(like.device, like.dtype).train(flow.training)
        for module, training in modes:  # layers that are kept, and an embedding net: they may be frozen in eval mode
            module.training = training
        return converted


def _converted(name: str, original: nn.Module, reading: Reading) -> tuple[Flow, Sources]:
    """The flow that was read, in float64."""
    transforms = [layer for layer in reading.layers if isinstance(layer, Transform)]
    if not transforms:
        reasons = [layer.reason for layer in reading.layers if isinstance(layer, Kept)]
        raise ConversionError(
            f"{name} has no coupling or autoregressive layer that can be fused. " + "; ".join(reasons)
        )
    shape, embedding = reading.context_shape, reading.embedding
    if shape is None:
        raise ConversionError(
            "the shape of the context is unknown, since its embedding_net does not start with a linear layer: give an "
            "example, convert(flow, context=…)"
        )
    if embedding is None:
        if len(shape) > 1 and any(layer.is_mlp for layer in transforms):
            raise ConversionError(f"without an embedding_net a context is one vector for each sample, not {shape}")
        return fuse(reading.layers, reading.event_shape, shape)
    try:
        with torch.no_grad():  # in eval mode: running statistics must not see zeros
            embedded = copy.deepcopy(embedding).eval()(reading.contexts(2, torch.Generator())).shape[1:]
    except (RuntimeError, IndexError) as error:
        raise ConversionError(
            f"the embedding_net fails on contexts of shape {shape} ({error}): give an example, convert(flow, context=…)"
        ) from error
    flow, sources = fuse(reading.layers, reading.event_shape, tuple(embedded))
    return Embedded(flow, embedding, shape), sources
