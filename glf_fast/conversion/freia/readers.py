"""Reads FrEIA's modules, on vectors and images; forward is data → noise."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glf_fast.conversion.chains import Part
from glf_fast.conversion.couplings import DeclaredCoupling
from glf_fast.conversion.freia.clamps import LogScale, recognised
from glf_fast.conversion.freia.modules import check_initialised, own_context
from glf_fast.conversion.layers import Dense, Diagonal, Layer, Permutation, Unfusable, trained_together
from glf_fast.conversion.library import Reader

__all__ = ["ON_IMAGES", "ON_VECTORS"]


# -- couplings: two networks, or pairs of them, each on one half -------------------------------------------------------


def _glow(part: Part) -> list[Layer]:
    return _two_sided(part, part.module.subnet2, part.module.subnet1, _log_scale(part.module))


def _rnvp(part: Part) -> list[Layer]:
    m = part.module
    return _two_sided(part, (m.subnet_s2, m.subnet_t2), (m.subnet_s1, m.subnet_t1), _log_scale(m))


def _nice(part: Part) -> list[Layer]:
    return _two_sided(part, part.module.F, part.module.G, None)


def _two_sided(part: Part, on_second: Any, on_first: Any, scale: LogScale | None) -> list[Layer]:
    first, second = _halves(part.module)
    return [_coupling(part, second, first, on_second, scale), _coupling(part, first, second, on_first, scale)]


def _one_sided(part: Part) -> list[Layer]:
    return [_coupling(part, *_halves(part.module), part.module.subnet, _log_scale(part.module))]


def _coupling(
    part: Part,
    passive: Tensor,
    transformed: Tensor,
    network: Any,
    scale: LogScale | None,
    factor_t: float = 1.0,
    *,
    gains: bool = False,
) -> Layer:
    """A coupling with outputs [u | t]; an additive one without log-scale. `gains` as in `Coupling`."""
    given = part.context or own_context(part.module)
    context = "none" if len(part.shape) == 3 and not given.columns else given
    declared = partial(DeclaredCoupling, passive, transformed, network, context=context)
    if scale is None:
        return declared("t").read(part)
    coupling = declared("ut", scale.name, scale.constant, scale.factor, factor_t)
    return replace(coupling.read(part), gains=gains)


def _halves(module: Any) -> tuple[Tensor, Tensor]:
    """The columns, or channels, of a block's two halves."""
    columns = torch.arange(module.channels, device=next((p.device for p in module.parameters()), None))
    if not 0 < module.split_len1 < module.channels:
        raise Unfusable(f"its split, {module.split_len1} of {module.channels} columns, leaves one half empty")
    return columns[: module.split_len1], columns[module.split_len1 :]


def _all_in_one(part: Part) -> list[Layer]:
    module = part.module
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
    n = module.in_channels
    if rotation.numel() == n:  # the indices of a hard permutation, in releases after 0.2
        rotation = torch.eye(n, device=rotation.device)[rotation.flatten()]
    rotation = rotation.view(n, n)
    n_passive, n_transformed = module.splits
    if not n_transformed:
        raise Unfusable("one column is too few for a coupling")
    columns = torch.arange(module.in_channels, device=rotation.device)
    scale, factor_t = _probe_all_in_one(module, n_transformed)
    permutation = _rotation(rotation)
    # The block multiplies by the matrix of a permutation, at a third of its whole cost where it is wide.
    multiplied = isinstance(permutation, Permutation) and not (module.householder or module.w_perm.numel() == n)
    factors = module.global_scale_activation(module.global_scale).view(-1)
    trained = trained_together(module.global_scale, module.global_offset)
    return [
        *([_rotation(rotation.T)] if module.reverse_pre_permute else []),
        _coupling(part, columns[:n_passive], columns[n_passive:], module.subnet, scale, factor_t, gains=multiplied),
        Diagonal(factors.log(), module.global_offset.view(-1), trained),
        permutation,
    ]


# -- log-scales, asked of the live object, since they changed between releases -----------------------------------------


def _log_scale(module: Any) -> LogScale:
    """The block's log-scale, a function of u."""
    return recognised(lambda u: module.clamp * module.f_clamp(u))


def _probe_all_in_one(module: Any, n: int) -> tuple[LogScale, float]:
    """Its log-scale, in which release 0.2 and later ones differ, and the factor of its shift."""
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


# -- affine layers -----------------------------------------------------------------------------------------------------


def _actnorm(part: Part) -> list[Layer]:
    module = part.module
    check_initialised(module)
    if hasattr(module, "loc"):  # newer than 0.2: (x − loc)·e^−log_scale
        log_scale, loc = module.log_scale.view(-1), module.loc.view(-1)
        trained = trained_together(module.log_scale, module.loc)
        return [Diagonal(-log_scale, -loc * torch.exp(-log_scale), trained)]
    return [Diagonal(module.scale.view(-1), module.bias.view(-1), trained_together(module.scale, module.bias))]


def _elementwise_scaling(part: Part) -> list[Layer]:
    s = part.module.s.view(-1)
    if s.requires_grad:
        raise Unfusable("it trains a scale without a shift; freeze it to fuse it")
    return [Diagonal(s, torch.zeros_like(s), trained=False)]


def _fixed_matrix(part: Part) -> list[Layer]:
    """`FixedLinearTransform` multiplies rows and may have a shift, `Fixed1x1Conv` multiplies columns."""
    M, shift = part.module.M, getattr(part.module, "b", None)
    W = M if len(part.shape) == 1 else M.flatten(1).T
    shift = shift.view(-1) if isinstance(shift, Tensor) else W.new_zeros(len(W))
    if M.requires_grad or shift.requires_grad:
        raise Unfusable("its matrix is trained, away from the inverse that it has stored")
    return [Dense(W, shift, trained=False, regular=False)]


def _orthogonal(part: Part) -> list[Layer]:
    module = part.module
    if any(p.requires_grad for p in module.parameters()):
        raise Unfusable("its matrix is free and orthogonal only after each correction; freeze it to fuse it")
    factor = torch.exp(module._log_e(module.scaling)).view(-1)
    W = _checked_orthogonal(module.weights)
    return [Dense(W * factor, module.bias.view(-1) * factor, trained=False, regular=True)]


def _householder(part: Part) -> list[Layer]:
    module = part.module
    if module.conditional:
        raise Unfusable("its reflections come from the condition")
    if not module.fixed and module.Vs.requires_grad:
        raise Unfusable("its reflections are trained; freeze them to fuse it")
    with torch.no_grad():
        # The library multiplies the reflections out in a function of its own: the matrix is what it does to I.
        eye = torch.eye(module.width, dtype=module.Vs.dtype, device=module.Vs.device)
        W = _checked_orthogonal(module((eye,))[0][0])
    return [Dense(W, W.new_zeros(module.width), trained=False, regular=True)]


def _rotation(W: Tensor) -> Permutation | Dense:
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


_ON_BOTH: dict[str, Reader] = {
    "ActNorm": _actnorm,
    "AffineCouplingOneSided": _one_sided,
    "AllInOneBlock": _all_in_one,
    "GLOWCouplingBlock": _glow,
    "NICECouplingBlock": _nice,
    "PermuteRandom": lambda part: [Permutation(part.module.perm)],
    "RNVPCouplingBlock": _rnvp,
}
ON_IMAGES = {**_ON_BOTH, "Fixed1x1Conv": _fixed_matrix}
ON_VECTORS = {
    **_ON_BOTH,
    "FixedLinearTransform": _fixed_matrix,
    "HouseholderPerm": _householder,
    "LearnedElementwiseScaling": _elementwise_scaling,
    "OrthogonalTransform": _orthogonal,
}
