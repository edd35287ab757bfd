"""Reads FrEIA's networks on vectors: `SequenceINN`, and a `GraphINN` that is a chain from one input to one output.

FrEIA's forward is data → noise. It knows no base distribution; N(0, I) is meant. Its conditions become one context:
those that some block uses, concatenated in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.clamps import LogScale, recognised
from glf_fast.conversion.freia_blocks import (
    UNINITIALIZED,
    KeptBlock,
    Seen,
    block_shape,
    blocks,
    part_widths,
    seen_context,
)
from glf_fast.conversion.images.reshaped import Reshaped
from glf_fast.conversion.layers import Conditioner, Coupling, Dense, Diagonal, Kept, Layer, Permutation, Unfusable
from glf_fast.conversion.mlp import read_mlp, scale_u, select_outputs, separate
from glf_fast.conversion.reading import ConversionError, Reading, read_each, trained_together

__all__ = [
    "AllInOne",
    "all_in_one",
    "halves",
    "has_exact_inverse",
    "log_scale",
    "read",
    "read_actnorm",
    "read_layer",
    "read_permutation",
]


def read(inn: Any, device: str = "cpu", read_block: Callable[[nn.Module, Seen], list[Layer]] | None = None) -> Reading:
    """The layers of a `SequenceINN` or of a `GraphINN` that is a chain, data → N(0, I).

    `read_block`: reads one module, `read_layer` if None.
    """
    read_block = read_block or read_layer
    chain, shape = blocks(inn)
    noise = shape
    widths: dict[int, int] = {}
    pixels: tuple[int, ...] = ()  # of the conditions
    for block in chain:
        if len(noise) > 1:  # vectors stay vectors
            (noise,) = block.module.output_dims([noise])  # type: ignore[operator]
        for index, dims in zip(block.conditions, block.module.dims_c, strict=True):  # type: ignore[arg-type]
            pixels = pixels if widths else tuple(dims[1:])
            if widths.setdefault(index, dims[0]) != dims[0] or tuple(dims[1:]) != pixels:
                raise ConversionError(
                    f"{block.name}: condition {index} of shape {tuple(dims)} does not fit beside the others in one context; "
                    "accelerate leaves the conditions as they are"
                )
    seen = {id(block.module): seen_context(block.conditions, widths) for block in chain}
    names = {id(block.module): block.name for block in chain}
    layers = read_each(
        [(block.name, block.module) for block in chain],
        lambda module: read_block(module, seen[id(module)]),
        lambda module: KeptBlock(module, seen[id(module)], part_widths(module), names[id(module)]),
        device,
    )

    def run(x: Tensor, context: Tensor | None, *, rev: bool) -> tuple[Tensor, Tensor]:
        conditions = [x.new_zeros(len(x), 0)] * max(
            1 + max(widths, default=-1), len(getattr(inn, "condition_nodes", ()))
        )
        if context is not None:
            for index, part in zip(sorted(widths), context.split([widths[i] for i in sorted(widths)], 1), strict=True):
                conditions[index] = part
        out, jac = inn(x, c=conditions, rev=rev)
        return (out if isinstance(out, Tensor) else out[0]), jac + x.new_zeros(len(x))

    def log_prob(x: Tensor, context: Tensor | None) -> Tensor:
        z, jac = run(x, context, rev=False)
        return jac - 0.5 * (z.square().flatten(1).sum(1) + math.prod(shape) * math.log(2 * math.pi))

    if noise != shape:
        layers.append(Kept(Reshaped(noise, shape), "noise has the data's shape"))
    return Reading(
        layers=layers,
        event_shape=shape,
        log_prob=log_prob,
        inverse=(lambda z, context: run(z.reshape(-1, *noise), context, rev=True)[0])
        if has_exact_inverse(layers)
        else None,
        context_shape=(sum(widths.values()), *pixels) if widths else (),
    )


def has_exact_inverse(layers: Sequence[Layer]) -> bool:
    """Whether the library's inverse is one to compare with: that of a rotation is its transpose, to float32."""
    return not any(isinstance(layer, Dense) and not layer.trained for layer in layers)


def read_layer(module: nn.Module, seen: Seen) -> list[Layer]:
    """One module's layers, data → noise; raises Unfusable."""
    reader = _READERS.get(type(module).__name__)
    if reader is None or not type(module).__module__.startswith("FrEIA."):
        raise Unfusable("no kernel covers this kind of layer")
    if len(block_shape(module)) != 1:
        raise Unfusable(f"it works on {module.dims_in}, not on one vector")
    layers = reader(module)
    return [
        replace(layer, conditioner=_widened(layer.conditioner, len(layer.passive), seen))
        if isinstance(layer, Coupling)
        else layer
        for layer in layers
    ]


# -- one function per class --------------------------------------------------------------------------------------------


def _glow(module: Any) -> list[Layer]:
    first, second = halves(module)
    scale = log_scale(module)
    return [
        _coupling(second, first, read_mlp(module.subnet2), module, scale),
        _coupling(first, second, read_mlp(module.subnet1), module, scale),
    ]


def _rnvp(module: Any) -> list[Layer]:
    first, second = halves(module)
    scale = log_scale(module)
    return [
        _coupling(second, first, separate(*map(read_mlp, (module.subnet_s2, module.subnet_t2))), module, scale),
        _coupling(first, second, separate(*map(read_mlp, (module.subnet_s1, module.subnet_t1))), module, scale),
    ]


def _nice(module: Any) -> list[Layer]:
    first, second = halves(module)
    return [
        _coupling(second, first, read_mlp(module.F), module, None),
        _coupling(first, second, read_mlp(module.G), module, None),
    ]


def _one_sided(module: Any) -> list[Layer]:
    first, second = halves(module)
    return [_coupling(first, second, read_mlp(module.subnet), module, log_scale(module))]


@dataclass(frozen=True)
class AllInOne:
    """What an `AllInOneBlock` is made of, data → noise: `before`, a coupling, `after`."""

    before: list[Layer]
    passive: Tensor
    transformed: Tensor
    scale: LogScale
    shift_factor: float
    after: list[Layer]


def all_in_one(module: Any) -> AllInOne:
    """The parts of an `AllInOneBlock` on vectors or images; raises Unfusable."""
    if module.GIN:
        raise Unfusable("gin_block=True subtracts the mean of the log-scales")
    if module.householder:
        if module.vk_householder.requires_grad:
            raise Unfusable("its Householder reflections are trained; freeze them to fuse the block")
        rotation = module._construct_householder_permutation()
    else:
        rotation = module.w_perm
    if rotation.requires_grad:
        raise Unfusable("its rotation is trained, away from the transpose that it takes for its inverse")
    rotation = rotation.view(module.in_channels, module.in_channels)
    n_passive, n_transformed = module.splits
    if not n_transformed:
        raise Unfusable("one column is too few for a coupling")
    columns = torch.arange(module.in_channels, device=rotation.device)
    scale, shift_factor = _probe_all_in_one(module, n_transformed)
    factors = module.global_scale_activation(module.global_scale).view(-1)
    trained = trained_together(module.global_scale, module.global_offset)
    return AllInOne(
        before=[rotation_layer(rotation.T)] if module.reverse_pre_permute else [],
        passive=columns[:n_passive],
        transformed=columns[n_passive:],
        scale=scale,
        shift_factor=shift_factor,
        after=[Diagonal(factors.log(), module.global_offset.view(-1), trained), rotation_layer(rotation)],
    )


def _all_in_one(module: Any) -> list[Layer]:
    parts = all_in_one(module)
    net = read_mlp(module.subnet)
    factor = torch.ones_like(net.biases[-1])
    factor[len(parts.transformed) :] = parts.shift_factor
    net = select_outputs(net, torch.arange(len(factor), device=factor.device), factor)
    return [*parts.before, _coupling(parts.passive, parts.transformed, net, module, parts.scale), *parts.after]


def read_actnorm(module: Any) -> list[Layer]:
    """Of vectors or images."""
    if module.init_on_next_batch:
        # Any call, a comparison's too, would initialise it with what happens to come first.
        raise ConversionError(UNINITIALIZED.format("a layer"))
    if hasattr(module, "loc"):  # newer than 0.2: (x − loc)·e^−log_scale
        log_scale, loc = module.log_scale.view(-1), module.loc.view(-1)
        trained = trained_together(module.log_scale, module.loc)
        return [Diagonal(-log_scale, -loc * torch.exp(-log_scale), trained)]
    return [Diagonal(module.scale.view(-1), module.bias.view(-1), trained_together(module.scale, module.bias))]


def _elementwise_scaling(module: Any) -> list[Layer]:
    if module.s.requires_grad:
        raise Unfusable("it trains a scale without a shift; freeze it to fuse it")
    return [Diagonal(module.s.view(-1), torch.zeros_like(module.s).view(-1), trained=False)]


def read_permutation(module: Any) -> list[Layer]:
    """Of columns or channels."""
    return [Permutation(module.perm)]


def _fixed_linear(module: Any) -> list[Layer]:
    shift = module.b.view(-1) if isinstance(module.b, Tensor) else module.M.new_zeros(len(module.M))
    if module.M.requires_grad or shift.requires_grad:
        raise Unfusable("its matrix is trained, away from the inverse that it has stored")
    return [Dense(module.M, shift, trained=False, regular=False)]


def _orthogonal(module: Any) -> list[Layer]:
    if any(p.requires_grad for p in module.parameters()):
        raise Unfusable("its matrix is free and orthogonal only after each correction; freeze it to fuse it")
    factor = torch.exp(module._log_e(module.scaling)).view(-1)
    W = _checked_orthogonal(module.weights)
    return [Dense(W * factor, module.bias.view(-1) * factor, trained=False, regular=True)]


def _householder(module: Any) -> list[Layer]:
    if module.conditional:
        raise Unfusable("its reflections come from the condition")
    if not module.fixed and module.Vs.requires_grad:
        raise Unfusable("its reflections are trained; freeze them to fuse it")
    with torch.no_grad():
        # The library multiplies the reflections out in a function of its own: the matrix is what it does to I.
        eye = torch.eye(module.width, dtype=module.Vs.dtype, device=module.Vs.device)
        W = _checked_orthogonal(module((eye,))[0][0])
    return [Dense(W, W.new_zeros(module.width), trained=False, regular=True)]


_READERS: dict[str, Callable[[Any], list[Layer]]] = {
    "ActNorm": read_actnorm,
    "AffineCouplingOneSided": _one_sided,
    "AllInOneBlock": _all_in_one,
    "FixedLinearTransform": _fixed_linear,
    "GLOWCouplingBlock": _glow,
    "HouseholderPerm": _householder,
    "LearnedElementwiseScaling": _elementwise_scaling,
    "NICECouplingBlock": _nice,
    "OrthogonalTransform": _orthogonal,
    "PermuteRandom": read_permutation,
    "RNVPCouplingBlock": _rnvp,
}


# -- log-scales: what they are is asked of the live object, since they changed between releases ------------------------


def log_scale(module: Any) -> LogScale:
    """What the block makes of u."""
    return recognised(lambda u: module.clamp * module.f_clamp(u))


def _probe_all_in_one(module: Any, n: int) -> tuple[LogScale, float]:
    """Its log-scale, and what the shift is multiplied by: 0.2 and later releases differ in the former."""
    device = module.global_scale.device

    def affine(u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        pixel = (1,) * module.input_rank
        raw = u.new_zeros(len(u), 2 * n, *pixel)
        raw[:, 0], raw[:, n] = (a.view(-1, *pixel) for a in (u, t))
        y, logdet = module._affine(u.new_zeros(len(u), n, *pixel), raw)  # 0.2 scales `raw` in place
        return y[:, 0].flatten(), logdet

    t = torch.linspace(-3, 3, 7, dtype=torch.float64, device=device)
    shift = affine(torch.zeros_like(t), t)[0]
    factor = round(float(shift[-1] / t[-1]), 12)
    if not torch.allclose(shift, factor * t, rtol=1e-9, atol=1e-12):
        raise Unfusable("its shift is not a multiple of the network's output")
    return recognised(lambda u: affine(u.to(device), torch.zeros_like(u, device=device))[1].cpu()), factor


# -- helpers -----------------------------------------------------------------------------------------------------------


def halves(module: Any) -> tuple[Tensor, Tensor]:
    """The columns, or channels, of a block's two halves."""
    columns = torch.arange(module.channels, device=_device(module))
    if not 0 < module.split_len1 < module.channels:
        raise Unfusable(f"its split, {module.split_len1} of {module.channels} columns, leaves one half empty")
    return columns[: module.split_len1], columns[module.split_len1 :]


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _coupling(passive: Tensor, transformed: Tensor, net: Conditioner, module: Any, scale: LogScale | None) -> Coupling:
    """A coupling with outputs [u | t], u multiplied by the log-scale's factor; an additive one without log-scale."""
    context = sum(dims[0] for dims in module.dims_c)
    wanted = len(passive) + context, len(transformed) * (2 if scale else 1)
    have = net.n_in, net.n_out
    if have != wanted:
        raise Unfusable(f"its network maps {have[0]} columns to {have[1]} where {wanted[0]} to {wanted[1]} are meant")
    if scale is None:
        return Coupling(passive, transformed, net, "exp", None, add_first=False)
    if scale.factor != 1:
        net = scale_u(net, scale.factor)
    return Coupling(passive, transformed, net, scale.name, scale.constant, add_first=False)


def _widened(net: Conditioner, passive: int, seen: Seen) -> Conditioner:
    """The network on [passive columns, whole context]: what it is not given has zero weights that are never trained."""
    if seen.columns == tuple(range(seen.width)):
        return net
    rows = torch.tensor([*range(passive), *(passive + c for c in seen.columns)], device=net.weights[0].device)
    weights, roles = list(net.weights), list(net.roles)
    shape = (*weights[0].shape[:-2], passive + seen.width, weights[0].shape[-1])
    weights[0] = weights[0].new_zeros(shape).index_copy(-2, rows, weights[0])
    roles[0] = roles[0].new_zeros(shape).index_copy(-2, rows, roles[0])
    return replace(net, weights=weights, roles=roles)


def rotation_layer(W: Tensor) -> Permutation | Dense:
    """x Wᵀ as a permutation if that is what it is."""
    if bool(((W == 0) | (W == 1)).all()):
        return Permutation(W.argmax(1))
    return Dense(_checked_orthogonal(W.T), W.new_zeros(len(W)), trained=False, regular=True)


def _checked_orthogonal(W: Tensor) -> Tensor:
    """W, if the library is right to call it orthogonal: it takes the log-determinant for 0 and Wᵀ for the inverse."""
    error = float((W.double() @ W.double().T - torch.eye(len(W), device=W.device)).abs().max())
    if error > 1e-5:
        raise Unfusable(f"its matrix is not orthogonal (by {error:.0e}), but its log-determinant is taken to be 0")
    return W
