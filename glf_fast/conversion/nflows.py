"""nflows, whose forward is data → noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glf_fast.conversion.couplings import DeclaredCoupling
from glf_fast.conversion.gaps import inverted_layers
from glf_fast.conversion.images.modules import OnChannels
from glf_fast.conversion.layers import Dense, Diagonal, Layer, Permutation, Unfusable
from glf_fast.conversion.library import (
    Base,
    Chain,
    ConversionError,
    FusedLayer,
    Library,
    Part,
    Shape,
    check_shape,
    context_features,
    put_transform,
    trained_together,
)
from glf_fast.flow import Flow
from glf_fast.reference import log_scale

__all__ = ["LIBRARY"]


class KeptTransform(nn.Module):
    """An nflows transform as it is: forward(x, context) and inverse(z, context) already mean what they mean here."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: output (B, *shape), logdet (B,)."""
        return self.transform(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: output (B, *shape), logdet (B,)."""
        return self.transform.inverse(z, context)  # type: ignore[operator]


class NflowsLayer(FusedLayer):
    """A transform."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: (B, *shape) → the same, logdet (B,)."""
        return self.flow(inputs, self._given(context))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: (B, *shape) → the same, logdet (B,)."""
        return self.flow.inverse(inputs, self._given(context))


# -- one function per class --------------------------------------------------------------------------------------------


def _coupling(part: Part) -> list[Layer]:
    transform = part.module
    if transform.unconditional_transform is not None:
        raise Unfusable("its passive columns are transformed, too")
    halves = transform.identity_features, transform.transform_features
    if type(transform).__name__ == "AdditiveCouplingTransform":
        return [DeclaredCoupling(*halves, transform.transform_net, "t").read(part)]
    return [DeclaredCoupling(*halves, transform.transform_net, "tu", *_read_log_scale(transform)).read(part)]


def _read_log_scale(transform: Any) -> tuple[str, float]:
    """Name and constant of what the object makes of u: log(σ(u + 2) + ε), or log σ(u + 2)."""
    n = transform.num_transform_features
    u = torch.linspace(-40, 40, 161, dtype=torch.float64)
    scale = transform._scale_and_shift(u[:, None].expand(-1, 2 * n))[0][:, 0]
    for name, constant in (("nflows", 1e-3), ("nflows", scale[0].item()), ("glow", 2.0)):
        if torch.allclose(scale, log_scale(u, name, constant).exp(), rtol=1e-12, atol=1e-16):
            return name, constant
    raise Unfusable("its scale is not σ(u + 2) + ε")


def _linear(part: Part) -> list[Layer]:
    """y = x Wᵀ + b, whatever makes W: from what it does to the unit vectors."""
    transform = part.module
    eye = torch.eye(part.shape[0], dtype=transform.bias.dtype)
    W = transform.forward_no_cache(eye)[0] - transform.bias
    trained = trained_together(*transform.parameters())
    return [Dense(W, transform.bias, trained, regular=type(transform).__name__ != "NaiveLinear")]


def _one_by_one(part: Part) -> list[Layer]:
    """A fixed permutation, then y = W x + b for every pixel."""
    transform = part.module
    dense = Dense(transform.weight().T, transform.bias, trained_together(*transform.parameters()), regular=True)
    return [Permutation(transform.permutation._permutation), dense]


def _householder(part: Part) -> list[Layer]:
    transform, (dim,) = part.module, part.shape
    if any(p.requires_grad for p in transform.parameters()):
        raise Unfusable("a trained matrix of ours would not stay orthogonal")
    W = transform(torch.eye(dim, dtype=transform.q_vectors.dtype))[0]
    return [Dense(W, W.new_zeros(dim), False, True)]


def _actnorm(part: Part) -> list[Layer]:
    transform = part.module
    if not transform.initialized:
        raise ConversionError("ActNorm has not seen data yet: run one training batch through the flow first")
    return [Diagonal(transform.log_scale, transform.shift, trained_together(*transform.parameters()))]


def _batch_norm(part: Part) -> list[Layer]:
    transform = part.module
    if transform.training:
        raise Unfusable("batch norm in training mode; in eval mode it is fused")
    log_scale = torch.log(transform.weight) - 0.5 * torch.log(transform.running_var + transform.eps)
    shift = transform.bias - transform.running_mean * torch.exp(log_scale)
    return [Diagonal(log_scale, shift, trained_together(*transform.parameters()), statistics=True)]


def _permutation(part: Part) -> list[Layer]:
    if part.module._dim != 1:
        raise Unfusable(f"permutes dimension {part.module._dim}, not the columns")
    return [Permutation(part.module._permutation)]


def _pointwise_affine(part: Part) -> list[Layer]:
    scale, shift = (torch.as_tensor(t) for t in (part.module._scale, part.module._shift))
    if len(part.shape) == 3 and max(scale.numel(), shift.numel()) > 1:
        raise Unfusable("its scale and shift are not one number each")
    dim = part.shape[0]
    return [Diagonal(scale.expand(dim).log(), shift.to(scale).expand(dim), False)]


def _inverse(part: Part) -> list[Layer]:
    return inverted_layers(LIBRARY.read_inside(part, part.module._transform))


def _multiscale(part: Part) -> list[Layer]:
    raise Unfusable("it stays; the layers of its scales are replaced")


# -- shapes of images --------------------------------------------------------------------------------------------------


def _input_shapes(modules: Iterable[nn.Module], noise: Shape) -> list[Shape]:
    """Shape of what each transform is given, by that of what the last one returns."""
    shapes: list[Shape] = []
    shape = noise
    module: Any
    for module in reversed(list(modules)):
        if type(module).__name__ == "SqueezeTransform" and len(shape) == 3:
            C, H, W = shape
            shape = (C // module.factor**2, H * module.factor, W * module.factor)
        elif type(module).__name__ == "MultiscaleCompositeTransform":
            first = [m for _, m in LIBRARY.flattened(module._transforms[0], "")]
            shape = _input_shapes(first, _scale_shapes(module)[0])[0]
        shapes.insert(0, shape)
    return shapes


def _scale_shapes(multiscale: Any) -> list[Shape]:
    """Shape of what each transform of a `MultiscaleCompositeTransform` returns: what it outputs, and what goes on."""
    shapes: list[Shape] = []
    split = multiscale._split_dim - 1
    going_on = 0
    for transform, output in zip(reversed(multiscale._transforms), reversed(multiscale._output_shapes), strict=True):
        if len(output) != 3:
            raise ConversionError(f"MultiscaleCompositeTransform on samples of {tuple(output)}: images are covered")
        shape = tuple(n + going_on * (i == split) for i, n in enumerate(output))
        shapes.insert(0, shape)
        modules = [module for _, module in LIBRARY.flattened(transform, "")]
        going_on = (_input_shapes(modules, shape)[0] if modules else shape)[split]
    return shapes


class Nflows(Library):
    """Flows are a transform, a distribution and an embedding net."""

    package = "nflows"
    flows = ("Flow",)
    packages = ("nflows.flows", "nflows.transforms")
    compositions: ClassVar = {"CompositeTransform": "_transforms"}
    on_both: ClassVar = {
        "AffineCouplingTransform": _coupling,
        "AdditiveCouplingTransform": _coupling,
        "ActNorm": _actnorm,
        "Permutation": _permutation,
        "RandomPermutation": _permutation,
        "ReversePermutation": _permutation,
        "PointwiseAffineTransform": _pointwise_affine,
        "AffineTransform": _pointwise_affine,
        "IdentityTransform": lambda part: [],
        "InverseTransform": _inverse,
    }
    on_vectors: ClassVar = {
        **on_both,
        "LULinear": _linear,
        "QRLinear": _linear,
        "SVDLinear": _linear,
        "NaiveLinear": _linear,
        "HouseholderSequence": _householder,
        "BatchNorm": _batch_norm,
    }
    on_images: ClassVar = {
        **on_both,
        "OneByOneConvolution": _one_by_one,
        "MultiscaleCompositeTransform": _multiscale,
    }
    # 1.1 to 2.8 times as fast (12 and 48 channels, 64 to 8,192 pixels, one core); normflows' own is not slower than ours.
    alone = frozenset({"OneByOneConvolution"})

    def chains(self, flow: Any) -> list[Chain]:
        """`flow._transform`, and the scales of what is multi-scale in it."""
        return self._chains(flow, "_transform", "_transform", tuple(getattr(flow._distribution, "_shape", ())))

    def _chains(self, holder: nn.Module, name: str, path: str, noise: Shape) -> list[Chain]:
        """Of holder.`name`, one transform or a composition."""
        named = list(self.flattened(getattr(holder, name), path))
        scales = [
            chain
            for path, module in named
            if type(module).__name__ == "MultiscaleCompositeTransform"
            for i, shape in enumerate(_scale_shapes(module))
            for chain in self._chains(module._transforms, str(i), f"{path}._transforms.{i}", shape)  # type: ignore
        ]
        if scales and len(named) == 1:
            return scales
        if not scales:
            check_shape("it", noise)
        shapes = _input_shapes([module for _, module in named], noise)
        parts = [Part(*pair, shape) for pair, shape in zip(named, shapes, strict=True)]
        return [Chain(parts, partial(put_transform, holder, name, "_transforms", parts)), *scales]

    def keep(self, part: Part) -> nn.Module:
        """Of any transform."""
        return KeptTransform(part.module)

    def adapt(self, fused: Flow | OnChannels, parts: Sequence[Part]) -> nn.Module:
        """As a transform."""
        return NflowsLayer(fused)

    def base(self, flow: Any) -> Base:
        """A standard normal; on vectors a diagonal one, too."""
        if any(type(module).__name__ == "MultiscaleCompositeTransform" for module in flow.modules()):
            raise ConversionError(
                "MultiscaleCompositeTransform has noise of several shapes: it stays, and glf_fast.accelerate replaces the "
                "layers of its scales in place"
            )
        base = flow._distribution
        name = type(base).__name__
        if name == "StandardNormal":
            return Base(tuple(base._shape))
        if name == "DiagonalNormal" and len(base._shape) == 1:
            return Base.normal(name, base.mean_[0], base.log_std_[0], base.mean_, base.log_std_)
        raise ConversionError(
            f"base distribution {name}: on images, StandardNormal is covered, on vectors DiagonalNormal, too"
        )

    def log_prob(self, flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
        """With the embedding net."""
        return flow.log_prob(x, context=context)

    def generate(self, flow: Any, noise: Tensor, context: Tensor | None) -> Tensor:
        """With the embedding net."""
        embedded = None if context is None else flow._embedding_net(context)
        return flow._transform.inverse(noise, context=embedded)[0]

    def embedding(self, flow: Any) -> nn.Module | None:
        """`embedding_net`."""
        return None if type(flow._embedding_net) is nn.Identity else flow._embedding_net

    def context_shape(self, parts: Sequence[Part]) -> Shape:
        """What the networks say that they were made for; on images a `ConvResidualNet`."""
        modules = [module for part in parts for module in part.module.modules()]
        if not parts or len(parts[0].shape) == 1:
            columns = context_features(modules)
            return (columns,) if columns else ()
        channels = (getattr(module, "context_channels", None) for module in modules)
        found = next((n for n in channels if isinstance(n, int)), None)
        return () if found is None else (found, *parts[0].shape[1:])

    def invertible(self, parts: Sequence[Part], layers: Sequence[Layer]) -> bool:
        """Not a NaiveLinear: it calls torch.solve, which PyTorch has removed."""
        return not any(type(module).__name__ == "NaiveLinear" for part in parts for module in part.module.modules())

    def prepare(self, copied: nn.Module) -> None:
        """What caches hold is of the original, in its dtype; ½ D ln 2π was rounded where a flow was in half precision."""
        for module in copied.modules():
            if hasattr(module, "using_cache"):
                module.using_cache = False  # type: ignore[assignment]
            if type(module).__name__ in ("StandardNormal", "DiagonalNormal") and self.owns(type(module)):
                module._log_z.fill_(0.5 * math.prod(module._shape) * math.log(2 * math.pi))  # type: ignore


LIBRARY = Nflows()
