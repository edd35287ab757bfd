"""nflows, whose forward is data → noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion import mlp
from glf_fast.conversion.activations import named_activation
from glf_fast.conversion.chains import Chain, Part, Shape, put_in_list, put_transform
from glf_fast.conversion.couplings import DeclaredCoupling
from glf_fast.conversion.gaps import inverted_layers
from glf_fast.conversion.layers import (
    ConversionError,
    Dense,
    Diagonal,
    Kept,
    Layer,
    Permutation,
    Scale,
    Unfusable,
    check_started,
    trained_together,
)
from glf_fast.conversion.library import Base, FusedLayer, Library, Reader, check_shape
from glf_fast.conversion.log_scales import recognised
from glf_fast.conversion.nflows_layers import affine_autoregressive, columns_of, spline_autoregressive, spline_coupling
from glf_fast.conversion.training_mode import BATCH_NORM
from glf_fast.flow import Split

__all__ = ["LIBRARY"]


def _mlp(module: Any) -> Iterator[mlp.Step]:
    """torch.fx can follow its forward, too, but takes thirty times as long."""
    if len(module._in_shape) != 1 or len(module._out_shape) != 1:
        raise Unfusable("an nflows MLP on something other than vectors")
    activation = named_activation(module._activation)
    for linear in (module._input_layer, *module._hidden_layers):
        yield from mlp.network_steps(linear)
        yield activation
    yield from mlp.network_steps(module._output_layer)
    if module._activate_output:
        yield activation


mlp.KNOWN["nflows.nn.nets.mlp.MLP"] = _mlp


# -- one function per class --------------------------------------------------------------------------------------------


def _coupling(part: Part) -> list[Layer]:
    transform = part.module
    if transform.unconditional_transform is not None:
        raise Unfusable("its passive columns are transformed, too")
    halves = transform.identity_features, transform.transform_features
    additive = LIBRARY.name_of(type(transform)) == "AdditiveCouplingTransform"
    options = ("t",) if additive else ("tu", _log_scale(transform))
    return [DeclaredCoupling(*halves, transform.transform_net, *options).read(part)]


def _log_scale(transform: Any) -> Scale:
    """The log-scale that the object makes of u: log(σ(u + 2) + ε), or log σ(u + 2)."""
    u = torch.linspace(-40, 40, 161, dtype=torch.float64)
    numbers = u[:, None].expand(-1, 2 * transform.num_transform_features)
    scale = transform._scale_and_shift(numbers)[0][:, 0]
    candidates = Scale("nflows", 1e-3), Scale("nflows", scale[0].item()), Scale("glow", 2.0)
    return recognised(candidates, u, scale.log(), "its scale is not σ(u + 2) + ε")


def _linear(part: Part) -> list[Layer]:
    """y = x Wᵀ + b, whatever makes W: from what it does to the unit vectors."""
    transform = part.module
    eye = torch.eye(part.shape[0], dtype=transform.bias.dtype)
    W = transform.forward_no_cache(eye)[0] - transform.bias
    trained = trained_together(*transform.parameters())
    return [Dense(W, transform.bias, trained, regular=LIBRARY.name_of(type(transform)) != "NaiveLinear")]


def _one_by_one(part: Part) -> list[Layer]:
    """A fixed permutation, then y = W x + b for every pixel."""
    transform = part.module
    dense = Dense(transform.weight().T, transform.bias, trained_together(*transform.parameters()), regular=True)
    return [Permutation(transform.permutation._permutation), dense]


def _householder(part: Part) -> list[Layer]:
    transform, (dim,) = part.module, part.shape
    if any(p.requires_grad for p in transform.parameters()):
        raise Unfusable("a trained matrix would not stay orthogonal in the converted flow")
    W = transform(torch.eye(dim, dtype=transform.q_vectors.dtype))[0]
    return [Dense(W, W.new_zeros(dim), False, True)]


def _actnorm(part: Part) -> list[Layer]:
    transform = part.module
    check_started(bool(transform.initialized))
    return [Diagonal(transform.log_scale, transform.shift, trained_together(*transform.parameters()))]


def _batch_norm(part: Part) -> list[Layer]:
    transform = part.module
    if transform.training:
        raise Unfusable("batch norm in training mode; in eval mode it is fused")
    log_scale = torch.log(transform.weight) - 0.5 * torch.log(transform.running_var + transform.eps)
    shift = transform.bias - transform.running_mean * torch.exp(log_scale)
    return [Diagonal(log_scale, shift, trained_together(*transform.parameters()), lost=BATCH_NORM)]


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


def _multiscale(part: Part) -> list[Layer]:
    raise Unfusable("it stays; the layers of its scales are replaced")


def _chains(flow: Any) -> list[Chain]:
    """`flow._transform`, and the scales of what is multi-scale in it; or a composition that no flow of the library holds."""
    if LIBRARY.name_of(type(flow)) == "CompositeTransform":
        return _chain_alone(flow)
    base = flow._distribution
    if not hasattr(base, "_shape") and not _is_multiscale(flow):
        raise ConversionError(f"its base {type(base).__name__} is a model with a density of its own, not fixed noise")
    return _chains_of(flow, "_transform", "_transform", tuple(getattr(base, "_shape", ())))


def _chain_alone(composition: Any) -> list[Chain]:
    """The transforms of a composition on vectors, whose number of columns one of them says."""
    named = list(LIBRARY.flattened(composition, "it"))
    columns = next((n for _, module in named if (n := columns_of(module)) is not None), None)
    if columns is None:
        raise ConversionError("not in a flow whose layers can be replaced")
    modules = [module for _, module in named]
    return [Chain(LIBRARY.placed(named, (columns,)), partial(put_in_list, composition, "_transforms", modules))]


def _is_multiscale(flow: nn.Module) -> bool:
    return any(type(module).__name__ == "MultiscaleCompositeTransform" for module in flow.modules())


def _chains_of(holder: nn.Module, name: str, path: str, noise: Shape) -> list[Chain]:
    """The chains of holder.`name`, one transform or a composition."""
    named = list(LIBRARY.flattened(getattr(holder, name), path))
    scales = [
        chain
        for path, module in named
        if type(module).__name__ == "MultiscaleCompositeTransform"
        for i, shape in enumerate(_scales(module))
        for chain in _chains_of(module._transforms, str(i), f"{path}._transforms.{i}", shape)  # type: ignore
    ]
    if scales and len(named) == 1:
        return scales
    if not scales:
        check_shape("it", noise)
    parts = LIBRARY.placed(named, noise)
    return [Chain(parts, partial(put_transform, holder, name, "_transforms", parts)), *scales]


def _scales(multiscale: Any) -> list[Shape]:
    """Shape of what each transform of a `MultiscaleCompositeTransform` returns: what it outputs, and what goes on."""
    shapes: list[Shape] = []
    split = multiscale._split_dim - 1
    going_on = 0
    for transform, output in zip(reversed(multiscale._transforms), reversed(multiscale._output_shapes), strict=True):
        if len(output) != 3:
            raise ConversionError(f"MultiscaleCompositeTransform on samples of {tuple(output)}: images are covered")
        shapes.insert(0, tuple(n + going_on * (i == split) for i, n in enumerate(output)))
        going_on = _before_all(transform, shapes[0])[split]
    return shapes


def _before_all(transform: nn.Module, shape: Shape) -> Shape:
    parts = LIBRARY.placed(list(LIBRARY.flattened(transform, "")), shape)
    return parts[0].shape if parts else shape


def _shape_before(module: Any, shape: Shape) -> Shape:
    """Transforms that are multi-scale change it."""
    multiscale = type(module).__name__ == "MultiscaleCompositeTransform"
    return _before_all(module._transforms[0], _scales(module)[0]) if multiscale else shape


def _base(flow: Any) -> Base:
    """A standard normal; on vectors a diagonal one, too."""
    base = flow._distribution
    name = type(base).__name__
    if _is_multiscale(flow):
        if type(flow._transform).__name__ != "MultiscaleCompositeTransform" or name != "StandardNormal":
            raise ConversionError(
                "MultiscaleCompositeTransform is converted alone, with a StandardNormal; glf_fast.accelerate replaces the "
                "layers of its scales in place"
            )
        return _factored_out(flow._transform)
    if name == "StandardNormal":
        return Base(tuple(base._shape))
    if name == "DiagonalNormal" and len(base._shape) == 1:
        return Base.normal(name, base.mean_[0], base.log_std_[0], base.mean_, base.log_std_)
    raise ConversionError(
        f"base distribution {name}: on images, StandardNormal is covered, on vectors DiagonalNormal, too"
    )


def _factored_out(multiscale: Any) -> Base:
    """N(0, I), of which each scale factors out the first half of its channels; a `Split` takes the last."""
    scales = _scales(multiscale)
    between: list[list[Layer]] = []
    for C, *_ in scales[:-1]:
        if C % 2 or multiscale._split_dim != 1:
            raise ConversionError("MultiscaleCompositeTransform: halves of an even number of channels are converted")
        between.append([Permutation(torch.arange(C).roll(C // 2)), Kept(Split(C, learned=False), "its splits stay")])
    return Base(_before_all(multiscale._transforms[0], scales[0]), between=tuple(between))


def _generate(flow: Any, noise: Tensor, context: Tensor | None) -> Tensor:
    embedded = None if context is None else flow._embedding_net(context)
    return flow._transform.inverse(noise.reshape(-1, *flow._distribution._shape), context=embedded)[0]


def _invertible(parts: Sequence[Part], layers: Sequence[Layer]) -> bool:
    """NaiveLinear calls torch.solve, which PyTorch has removed."""
    return not any(type(module).__name__ == "NaiveLinear" for part in parts for module in part.module.modules())


def _prepare(copied: nn.Module) -> None:
    """Caches hold the original's tensors, in its dtype; ½ D ln 2π was rounded where a flow was in half precision."""
    for module in copied.modules():
        if hasattr(module, "using_cache"):
            module.using_cache = False  # type: ignore[assignment]
        if type(module).__name__ in ("StandardNormal", "DiagonalNormal") and LIBRARY.owns(type(module)):
            module._log_z.fill_(0.5 * math.prod(module._shape) * math.log(2 * math.pi))  # type: ignore


_ON_BOTH: dict[str, Reader] = {
    "AffineCouplingTransform": _coupling,
    "AdditiveCouplingTransform": _coupling,
    "PiecewiseRationalQuadraticCouplingTransform": lambda part: spline_coupling(part, part.module),
    "ActNorm": _actnorm,
    "Permutation": _permutation,
    "RandomPermutation": _permutation,
    "ReversePermutation": _permutation,
    "PointwiseAffineTransform": _pointwise_affine,
    "AffineTransform": _pointwise_affine,
    "IdentityTransform": lambda part: [],
    "InverseTransform": lambda part: inverted_layers(LIBRARY.read_inside(part, part.module._transform)),
}
LIBRARY: Library = Library(
    package="nflows",
    flows=("Flow",),
    hosts=("CompositeTransform",),
    packages=("nflows.flows", "nflows.transforms"),
    marks=("_transform", "_distribution"),
    chains=_chains,
    base=_base,
    log_prob=lambda flow, x, context: flow.log_prob(x, context=context),
    generate=_generate,
    kept=lambda part: part.module,  # its methods are those of a layer of this project, and mean the same
    fused=lambda fused, parts: FusedLayer(fused),
    on_vectors={
        **_ON_BOTH,
        "LULinear": _linear,
        "MaskedAffineAutoregressiveTransform": affine_autoregressive,
        "MaskedPiecewiseRationalQuadraticAutoregressiveTransform": lambda part: spline_autoregressive(
            part, part.module
        ),
        "QRLinear": _linear,
        "SVDLinear": _linear,
        "NaiveLinear": _linear,
        "HouseholderSequence": _householder,
        "BatchNorm": _batch_norm,
    },
    on_images={
        **_ON_BOTH,
        "OneByOneConvolution": _one_by_one,
        "MultiscaleCompositeTransform": _multiscale,
    },
    squeezes={"SqueezeTransform": lambda module: module.factor},
    compositions={"CompositeTransform": "_transforms"},
    # 1.1 to 2.8 times as fast (12 and 48 channels, 64 to 8,192 pixels, one core); normflows' layer is as fast as the fused one.
    alone=frozenset({"OneByOneConvolution"}),
    shape_before=_shape_before,
    embedding=lambda flow: None if type(flow._embedding_net) is nn.Identity else flow._embedding_net,
    invertible=_invertible,
    prepare=_prepare,
)
