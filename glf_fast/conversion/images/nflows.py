"""Reads nflows' transforms of images, and flows of those."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.gaps import inverted_layers
from glf_fast.conversion.images.networks import Outputs
from glf_fast.conversion.images.reshaped import Reshaped
from glf_fast.conversion.layers import Dense, Kept, Layer, NetworkCoupling, Permutation, Unfusable
from glf_fast.conversion.nflows import KeptTransform, read_log_scale, transforms
from glf_fast.conversion.nflows import read_transform as read_transform_on_vectors
from glf_fast.conversion.reading import ConversionError, Reading, read_each, trained_together

__all__ = ["input_shapes", "network_context", "read", "read_transform", "scale_shapes"]

Shape = tuple[int, ...]


def read(flow: Any, device: str = "cpu") -> Reading:
    """An `nflows.flows.Flow` on images whose base is a standard normal; its caches are switched off."""
    base = flow._distribution
    if type(base).__name__ != "StandardNormal":
        raise ConversionError(f"base distribution {type(base).__name__}: on images, StandardNormal is covered")
    for module in flow.modules():
        if hasattr(module, "using_cache"):
            module.use_cache(False)
    noise = tuple(base._shape)
    base._log_z.fill_(0.5 * math.prod(noise) * math.log(2 * math.pi))
    named = list(transforms(flow._transform))
    shapes = input_shapes([module for _, module in named], noise)
    of = {id(module): shape for (_, module), shape in zip(named, shapes, strict=True)}
    others = [base, flow._embedding_net]
    layers = read_each(named, lambda module: read_transform(module, of[id(module)]), KeptTransform, device, others)
    event_shape = shapes[0] if shapes else noise
    if event_shape != noise:
        layers.append(Kept(Reshaped(noise, event_shape), "noise has the data's shape"))

    def inverse(z: Tensor, context: Tensor | None) -> Tensor:
        embedded = None if context is None else flow._embedding_net(context)
        return flow._transform.inverse(z.reshape(-1, *noise), context=embedded)[0]

    embedding = None if type(flow._embedding_net) is nn.Identity else flow._embedding_net
    return Reading(
        layers=layers,
        event_shape=event_shape,
        log_prob=lambda x, context: flow.log_prob(x, context=context),
        inverse=inverse,
        embedding=embedding,
        context_shape=network_context(flow.modules(), event_shape) if embedding is None else None,
    )


def input_shapes(modules: Iterable[nn.Module], noise: Shape) -> list[Shape]:
    """Shape of what each transform is given, by that of what the last one returns."""
    shapes: list[Shape] = []
    shape = noise
    module: Any
    for module in reversed(list(modules)):
        if type(module).__name__ == "SqueezeTransform":
            C, H, W = shape
            shape = (C // module.factor**2, H * module.factor, W * module.factor)
        elif type(module).__name__ == "MultiscaleCompositeTransform":
            first = [m for _, m in transforms(module._transforms[0])]
            shape = input_shapes(first, scale_shapes(module)[0])[0]
        shapes.insert(0, shape)
    return shapes


def scale_shapes(multiscale: Any) -> list[Shape]:
    """Shape of what each transform of a `MultiscaleCompositeTransform` returns: what it outputs, and what goes on."""
    shapes: list[Shape] = []
    split = multiscale._split_dim - 1
    going_on = 0
    for transform, output in zip(reversed(multiscale._transforms), reversed(multiscale._output_shapes), strict=True):
        if len(output) != 3:
            raise ConversionError(f"MultiscaleCompositeTransform on samples of {tuple(output)}: images are covered")
        shape = tuple(n + going_on * (i == split) for i, n in enumerate(output))
        shapes.insert(0, shape)
        modules = [module for _, module in transforms(transform)]
        going_on = (input_shapes(modules, shape)[0] if modules else shape)[split]
    return shapes


def network_context(modules: Iterable[nn.Module], shape: Shape) -> Shape:
    """Of one sample's context, where a `ConvResidualNet` on images of that shape says so; () if none does."""
    channels = (getattr(module, "context_channels", None) for module in modules)
    found = next((n for n in channels if isinstance(n, int)), None)
    return () if found is None else (found, *shape[1:])


def read_transform(transform: Any, shape: Shape) -> list[Layer]:
    """The layers of one transform on images (C, H, W); raises Unfusable."""
    kind = type(transform).__name__ if type(transform).__module__.startswith("nflows.") else ""
    C = shape[0]
    if kind in ("AffineCouplingTransform", "AdditiveCouplingTransform"):
        return [_coupling(transform, additive=kind.startswith("Additive"))]
    if kind == "OneByOneConvolution":
        return _one_by_one(transform, C)
    if kind == "InverseTransform":
        return inverted_layers([x for _, t in transforms(transform._transform) for x in read_transform(t, shape)])
    if kind in ("PointwiseAffineTransform", "AffineTransform"):
        if max(torch.as_tensor(t).numel() for t in (transform._scale, transform._shift)) > 1:
            raise Unfusable("its scale and shift are not one number each")
    elif kind == "MultiscaleCompositeTransform":
        raise Unfusable("it stays; the layers of its scales are replaced")
    elif kind not in ("ActNorm", "IdentityTransform", "Permutation", "RandomPermutation", "ReversePermutation"):
        raise Unfusable(f"{type(transform).__name__} is no coupling, normalization or 1 x 1 convolution of images")
    return read_transform_on_vectors(transform, C)


def _coupling(transform: Any, *, additive: bool) -> NetworkCoupling:
    if transform.unconditional_transform is not None:
        raise Unfusable("its passive channels are transformed, too")
    passive, transformed = transform.identity_features, transform.transform_features
    if not len(passive) or not len(transformed):
        raise Unfusable("its mask leaves no channel to condition on, or none to transform")
    if additive:
        return NetworkCoupling(passive, transformed, Outputs(transform.transform_net, "t"), "exp", None, False)
    name, constant = read_log_scale(transform)
    return NetworkCoupling(passive, transformed, Outputs(transform.transform_net, "tu"), name, constant, False)


def _one_by_one(transform: Any, C: int) -> list[Layer]:
    """A fixed permutation, then y = W x + b for every pixel."""
    weight = transform.weight()
    dense = Dense(weight.T, transform.bias, trained_together(*transform.parameters()), regular=True)
    return [Permutation(transform.permutation._permutation), dense]
