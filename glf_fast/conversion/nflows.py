"""Reads nflows' flows, whose forward is data → noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.gaps import inverted_layers
from glf_fast.conversion.layers import Coupling, Dense, Diagonal, Layer, Permutation, Unfusable
from glf_fast.conversion.mlp import read_mlp, select_outputs
from glf_fast.conversion.reading import (
    ConversionError,
    Reading,
    check_vectors,
    context_features,
    read_each,
    trained_together,
)
from glf_fast.reference import log_scale

__all__ = ["KeptTransform", "has_inverse", "read", "read_log_scale", "read_transform", "transforms"]


class KeptTransform(nn.Module):
    """An nflows transform as it is: forward(x, context) and inverse(z, context) already mean what they mean here."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: output (B, D), logdet (B,)."""
        return self.transform(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: output (B, D), logdet (B,)."""
        return self.transform.inverse(z, context)  # type: ignore[operator]


def read(flow: Any, device: str = "cpu") -> Reading:
    """An `nflows.flows.Flow` on vectors whose base is a standard or a diagonal normal; its caches are switched off."""
    base = flow._distribution
    if type(base).__name__ not in ("StandardNormal", "DiagonalNormal"):
        raise ConversionError(f"base distribution {type(base).__name__}: StandardNormal and DiagonalNormal are covered")
    check_vectors("the flow", tuple(base._shape))
    dim = base._shape[0]
    for module in flow.modules():
        if hasattr(module, "using_cache"):
            module.use_cache(False)  # its cache is of the dtype that the flow had, and is made in float32
    # ½ D ln 2π, rounded where the flow was in half precision: a density must not lose it.
    base._log_z.fill_(0.5 * dim * math.log(2 * math.pi))
    others = [base, flow._embedding_net]
    layers = read_each(transforms(flow._transform), lambda t: read_transform(t, dim), KeptTransform, device, others)
    if type(base).__name__ == "DiagonalNormal":
        mean, log_std = base.mean_[0], base.log_std_[0]
        try:
            trained = trained_together(base.mean_, base.log_std_)
        except Unfusable as reason:
            raise ConversionError(f"base distribution DiagonalNormal: {reason}") from None
        layers.append(Diagonal(-log_std, -mean * torch.exp(-log_std), trained))

    def inverse(z: Tensor, context: Tensor | None) -> Tensor:
        if type(base).__name__ == "DiagonalNormal":
            z = base.mean_ + z * torch.exp(base.log_std_)
        embedded = None if context is None else flow._embedding_net(context)
        return flow._transform.inverse(z, context=embedded)[0]

    embedding = None if type(flow._embedding_net) is nn.Identity else flow._embedding_net
    fused = max([c.context_dim() for c in layers if isinstance(c, Coupling)], default=0)
    columns = fused or context_features(flow._transform.modules())
    return Reading(
        layers=layers,
        event_shape=(dim,),
        log_prob=lambda x, context: flow.log_prob(x, context=context),
        inverse=inverse if has_inverse([flow]) else None,
        embedding=embedding,
        context_shape=_input_shape(embedding, columns) if embedding or columns else (),
    )


def has_inverse(modules: Iterable[nn.Module]) -> bool:
    """Whether they can be inverted: NaiveLinear calls torch.solve, which PyTorch has removed."""
    return not any(type(part).__name__ == "NaiveLinear" for module in modules for part in module.modules())


def transforms(transform: nn.Module, name: str = "_transform") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the transforms, one by one, in nested compositions too."""
    if type(transform).__name__ == "CompositeTransform":
        for i, part in enumerate(transform._transforms):  # type: ignore[arg-type]
            yield from transforms(part, f"{name}._transforms.{i}")
    else:
        yield name, transform


def read_transform(transform: nn.Module, dim: int) -> list[Layer]:
    """The layers of one transform on vectors of `dim` columns; raises Unfusable."""
    kind = type(transform)
    if kind.__name__ == "MultiscaleCompositeTransform":
        raise ConversionError(
            "MultiscaleCompositeTransform has noise of several shapes: it stays, and glf_fast.accelerate replaces the layers "
            "of its scales in place"
        )
    reader = _READERS.get(kind.__name__) if kind.__module__.startswith("nflows.") else None
    if reader is None:
        raise Unfusable(f"{kind.__name__} is not an affine coupling, a linear layer or a normalization")
    return reader(transform, dim)


def _coupling(transform: Any, dim: int) -> list[Layer]:
    if transform.unconditional_transform is not None:
        raise Unfusable("its passive columns are transformed, too")
    passive, transformed = transform.identity_features, transform.transform_features
    P, T = len(passive), len(transformed)
    mlp = read_mlp(transform.transform_net)
    additive = type(transform).__name__ == "AdditiveCouplingTransform"
    if mlp.weights[-1].shape[1] != T * (1 if additive else 2) or len(mlp.weights[0]) < P:
        raise Unfusable("its network's sizes do not fit its mask")
    if additive:
        return [Coupling(passive, transformed, mlp, "exp", None, False)]
    order = torch.arange(2 * T).roll(T)  # nflows has [t | u]
    name, constant = read_log_scale(transform)
    return [Coupling(passive, transformed, select_outputs(mlp, order), name, constant, False)]


def read_log_scale(transform: Any) -> tuple[str, float]:
    """Name and constant of what the object makes of u: log(σ(u + 2) + ε), or log σ(u + 2)."""
    n = transform.num_transform_features
    u = torch.linspace(-40, 40, 161, dtype=torch.float64)
    scale = transform._scale_and_shift(u[:, None].expand(-1, 2 * n))[0][:, 0]
    for name, constant in (("nflows", 1e-3), ("nflows", scale[0].item()), ("glow", 2.0)):
        if torch.allclose(scale, log_scale(u, name, constant).exp(), rtol=1e-12, atol=1e-16):
            return name, constant
    raise Unfusable("its scale is not σ(u + 2) + ε")


def _linear(transform: Any, dim: int) -> list[Layer]:
    """y = x Wᵀ + b, whatever makes W: from what it does to the unit vectors."""
    eye = torch.eye(dim, dtype=transform.bias.dtype)
    W = transform.forward_no_cache(eye)[0] - transform.bias
    trained = trained_together(*transform.parameters())
    return [Dense(W, transform.bias, trained, regular=type(transform).__name__ != "NaiveLinear")]


def _householder(transform: Any, dim: int) -> list[Layer]:
    if any(p.requires_grad for p in transform.parameters()):
        raise Unfusable("a trained matrix of ours would not stay orthogonal")
    W = transform(torch.eye(dim, dtype=transform.q_vectors.dtype))[0]
    return [Dense(W, W.new_zeros(dim), False, True)]


def _actnorm(transform: Any, dim: int) -> list[Layer]:
    if not transform.initialized:
        raise ConversionError("ActNorm has not seen data yet: run one training batch through the flow first")
    return [Diagonal(transform.log_scale, transform.shift, trained_together(*transform.parameters()))]


def _batch_norm(transform: Any, dim: int) -> list[Layer]:
    if transform.training:
        raise Unfusable("batch norm in training mode; in eval mode it is fused")
    log_scale = torch.log(transform.weight) - 0.5 * torch.log(transform.running_var + transform.eps)
    shift = transform.bias - transform.running_mean * torch.exp(log_scale)
    return [Diagonal(log_scale, shift, trained_together(*transform.parameters()), statistics=True)]


def _permutation(transform: Any, dim: int) -> list[Layer]:
    if transform._dim != 1:
        raise Unfusable(f"permutes dimension {transform._dim}, not the columns")
    return [Permutation(transform._permutation)]


def _pointwise_affine(transform: Any, dim: int) -> list[Layer]:
    scale = torch.as_tensor(transform._scale).expand(dim)
    return [Diagonal(scale.log(), torch.as_tensor(transform._shift).to(scale).expand(dim), False)]


def _inverse(transform: Any, dim: int) -> list[Layer]:
    inner = [layer for _, part in transforms(transform._transform) for layer in read_transform(part, dim)]
    return inverted_layers(inner)


_READERS: dict[str, Callable[[Any, int], list[Layer]]] = {
    "AffineCouplingTransform": _coupling,
    "AdditiveCouplingTransform": _coupling,
    "LULinear": _linear,
    "QRLinear": _linear,
    "SVDLinear": _linear,
    "NaiveLinear": _linear,
    "HouseholderSequence": _householder,
    "ActNorm": _actnorm,
    "BatchNorm": _batch_norm,
    "Permutation": _permutation,
    "RandomPermutation": _permutation,
    "ReversePermutation": _permutation,
    "PointwiseAffineTransform": _pointwise_affine,
    "AffineTransform": _pointwise_affine,
    "IdentityTransform": lambda transform, dim: [],
    "InverseTransform": _inverse,
}


def _input_shape(embedding: nn.Module | None, columns: int) -> tuple[int, ...] | None:
    """Of one sample's context: what the embedding net's first layer with parameters says; without one, unchanged."""
    modules = () if embedding is None else embedding.modules()
    first = next((m for m in modules if next(m.parameters(recurse=False), None) is not None), None)
    if first is None:
        return (columns,) if columns else None
    return (first.in_features,) if isinstance(first, nn.Linear) else None
