"""Affine coupling: the elementwise operation, and the whole flow of K steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops import cpp, layered, triton, triton_coupling, whole_flow
from glf_fast.ops.backends import backend_for
from glf_fast.ops.checks import (
    check_alike,
    check_choice,
    check_floating,
    check_hidden_layers,
    check_log_scale,
    check_shape,
    check_state,
)
from glf_fast.ops.linear import check_plu, kernels_take, plu_assemble
from glf_fast.ops.networks import as_one_network
from glf_fast.ops.options import Options
from glf_fast.reference import ACTIVATIONS, Plu

__all__ = ["affine_coupling", "coupling_flow", "coupling_flow_inverse", "coupling_flow_log_prob", "plu_flow_log_prob"]

MAX_LAYERS = 8  # of an MLP that the C++ kernels take


def affine_coupling(
    v: Tensor,
    u: Tensor,
    t: Tensor,
    *,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """w = v·e^f(u) + t (or `add_first`: (v + t)·e^f(u)), or its inverse, and the log-determinant.

    Args:
        v, u, t: transformed half, raw log-scale, shift; one shape (B, …), any strides.
        log_scale: name of f, see `glf_fast.reference.log_scale`; `log_scale_constant` replaces its default constant.
        inverse: undo it: v = (w − t)·e^−f(u), with `v` the given w.

    Returns:
        w like v, and logdet (B,) of the direction applied; both float32 or better.

    Raises:
        ValueError: shapes differ, or an unknown `log_scale`. TypeError: not floating-point.

    Source: RealNVP (arXiv:1605.08803), eq. 4; Glow (arXiv:1807.03039), table 1.
    """
    check_log_scale(log_scale, log_scale_constant)
    for name, tensor in (("v", v), ("u", u), ("t", t)):
        check_floating(name, tensor)
        if tensor.shape != v.shape or tensor.ndim < 2:
            raise ValueError(
                "v, u and t must have one shape (B, …) of two or more dimensions; "
                f"got v {tuple(v.shape)}, u {tuple(u.shape)}, t {tuple(t.shape)}"
            )
    check_alike((("u", u), ("t", t)), v if v.dtype.itemsize >= 4 else v.new_empty(0, dtype=torch.float32))
    # The kernels read u and t in whatever precision they come, and compute in v's, float32 at least.
    options = Options("relu", log_scale, log_scale_constant, add_first, inverse)
    backend = backend_for(v, "triton", "cpp")
    if backend == "triton":
        return triton_coupling.affine_coupling(v, u, t, options)
    if backend == "cpp":
        return cpp.affine_coupling(v, u.to(v.dtype), t.to(v.dtype), options)
    return reference.affine_coupling(
        v, u, t, log_scale=log_scale, log_scale_constant=log_scale_constant, add_first=add_first, inverse=inverse
    )


def coupling_flow(
    x: Tensor,
    A: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    *,
    activation: str = "relu",
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    reversible: bool = False,
) -> tuple[Tensor, Tensor]:
    """Data → noise through K steps of affine map and affine coupling.

    Step k computes y = x A_k + c_k, splits it into P = D − D//2 passive and D//2 transformed columns (p, v), and returns
    [p, v·e^f(u) + t] with (u, t) = MLP_k([p, context]).

    Args:
        x: (B, D). A: (K, D, D) and c: (K, D), from `plu_assemble` or any affine maps.
        weights, biases: per layer of the MLPs (K, nᵢ, nᵢ₊₁) and (K, nᵢ₊₁), from P + C to 2·(D//2) columns; to D//2 for
            additive couplings, v + t, to which the log-scale means nothing; or (K, 2, nᵢ, nᵢ₊₁) and (K, 2, nᵢ₊₁), from P + C
            to D//2 columns, for two networks, that of u and that of t.
        context: (B, C) or None. The options are those of `affine_coupling`; `activation` of the hidden layers.
        reversible: keep nothing for the backward but the output, which rebuilds the steps' inputs by undoing the steps:
            memory independent of K. For the kernels; the reference keeps what autograd keeps.

    Returns:
        z (B, D) and Σ ℓ (B,). The caller adds Σ_k log|det A_k|, one number for the whole batch.

    Raises:
        ValueError, TypeError: shapes, names, dtypes or devices that do not fit; the message says which.
    """
    options = Options(activation, log_scale, log_scale_constant, add_first, False)
    return _coupling_flow("x", x, A, c, weights, biases, context, options, reversible)


def coupling_flow_inverse(
    z: Tensor,
    A_inv: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    *,
    activation: str = "relu",
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    reversible: bool = False,
) -> tuple[Tensor, Tensor]:
    """Noise → data: undoes `coupling_flow`, given `A_inv` (K, D, D) = A⁻¹; all else as there.

    Returns x (B, D) and −Σ ℓ (B,).
    """
    options = Options(activation, log_scale, log_scale_constant, add_first, True)
    return _coupling_flow("z", z, A_inv, c, weights, biases, context, options, reversible)


def coupling_flow_log_prob(
    x: Tensor,
    A: Tensor,
    c: Tensor,
    logabsdet: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    *,
    activation: str = "relu",
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    reversible: bool = False,
) -> Tensor:
    """log p(x) = log N(z; 0, I) + Σ ℓ + `logabsdet` in nats, (B,), with z and Σ ℓ of `coupling_flow`.

    `logabsdet` is Σ_k log|det A_k|, a scalar tensor; all else as in `coupling_flow`.
    """
    options = Options(activation, log_scale, log_scale_constant, add_first, False, density=True)
    check_shape("logabsdet", logabsdet, (), "()")
    if (found := _attempt(x, A, c, weights, biases, context, options)) is not None:
        return found[1] + logabsdet
    x = _check_flow("x", x, A, c, weights, biases, context, options)
    kernels, weights, biases, options = _for_kernels(x, weights, biases, options)
    return _log_prob(kernels, x, A, c, logabsdet, weights, biases, context, options, reversible)


def plu_flow_log_prob(
    x: Tensor,
    plu: Plu,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    *,
    activation: str = "relu",
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    reversible: bool = False,
) -> Tensor:
    """`coupling_flow_log_prob` with the affine maps that `plu_assemble` makes of `plu`, its arguments for all K layers.

    One differentiable operation, assembly included: what a training step of a small flow costs is the number of those.
    """
    check_plu(plu)
    permutation, lower, upper, log_diag, sign, actnorm_log_scale, bias = plu
    options = Options(activation, log_scale, log_scale_constant, add_first, False)
    x = _check_flow("x", x, lower, log_diag, weights, biases, context, options)
    kernels, weights, biases, options = _for_kernels(x, weights, biases, options)
    if kernels in whole_flow.KERNELS and torch.is_grad_enabled() and kernels_take(plu):
        x, context, *layers = _ready(x, context, *weights, *biases)
        factors = _ready(lower, upper, log_diag, actnorm_log_scale, bias)
        options = _with_autocast(options, x)._replace(density=True)
        return whole_flow.plu_log_prob(kernels, x, permutation, sign, factors, layers, context, options, reversible)
    A, _, c, logabsdets = plu_assemble(*plu, need_inverse=False)
    return _log_prob(kernels, x, A, c, logabsdets.sum(), weights, biases, context, options, reversible)


def _log_prob(
    kernels: str,
    x: Tensor,
    A: Tensor,
    c: Tensor,
    logabsdet: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
    reversible: bool,
) -> Tensor:
    """The density by what `_for_kernels` chose, and made of the networks; all else is checked."""
    if kernels in whole_flow.KERNELS:
        x, A, c, logabsdet, context, *layers = _ready(x, A, c, logabsdet, context, *weights, *biases)
        options = _with_autocast(options, x)._replace(density=True)
        return whole_flow.log_prob(kernels, x, A, c, logabsdet, layers, context, options, reversible)
    z, logdet = _coupling_flow("x", x, A, c, weights, biases, context, options, reversible)
    return reference.log_normal(z) + logdet + logabsdet


def _coupling_flow(
    name: str,
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
    reversible: bool,
) -> tuple[Tensor, Tensor]:
    """Both directions; the state x is called `name` in messages."""
    if (found := _attempt(x, matrix, offset, weights, biases, context, options)) is not None:
        return found
    x = _check_flow(name, x, matrix, offset, weights, biases, context, options)
    kernels, weights, biases, options = _for_kernels(x, weights, biases, options)
    if kernels == "reference":
        run = reference.coupling_flow_inverse if options.inverse else reference.coupling_flow
        return run(x, matrix, offset, weights, biases, context, **options.of_flow())
    x, matrix, offset, context, *layers = _ready(x, matrix, offset, context, *weights, *biases)
    weights, biases = layers[: len(weights)], layers[len(weights) :]
    if kernels == "layered":
        return layered.coupling_flow(x, matrix, offset, weights, biases, context, options)
    options = _with_autocast(options, x)
    return whole_flow.coupling_flow(kernels, x, matrix, offset, layers, context, options, reversible)


def _attempt(
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor] | None:
    """The flow's output and logdet by the C++ kernels, or None where something must be differentiated, converted or explained.

    They refuse whatever `_check_flow` refuses, which says why, but takes 7 µs: a tenth of what a flow of a single row takes.
    """
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if recorded or x.dtype != matrix.dtype or _kernels(x, weights) != "cpp":
        return None
    _check_options(options)
    context = None if context is None else context.contiguous()  # an expanded one is common, a refusal takes 40 µs
    try:
        out, logdet, _ = cpp.forward(x.contiguous(), matrix, offset, None, weights, biases, context, options, False)
    except RuntimeError:
        return None
    return (out, logdet) if out.device == x.device else None  # else an argument had no data


def _for_kernels(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], options: Options
) -> tuple[str, Sequence[Tensor], Sequence[Tensor], Options]:
    """What runs this flow, and its networks as that takes them."""
    kernels = _kernels(x, weights)
    if kernels in ("triton", "layered"):
        return kernels, *as_one_network(weights, biases, x.shape[1] // 2, options)
    return kernels, weights, biases, options


def _kernels(x: Tensor, weights: Sequence[Tensor]) -> str:
    """What runs this flow: "cpp", "triton", "layered" where it is too wide for one launch, or "reference"."""
    backend = backend_for(x, "triton", "cpp")
    if backend == "triton" and not triton.fits(x.shape[1], weights):
        return "layered"
    return "reference" if backend == "cpp" and len(weights) > MAX_LAYERS else backend


def _ready(state: Tensor, *others: Tensor | None) -> list[Any]:
    """All contiguous and of the state's dtype: under autocast an offset that was itself computed arrives in bfloat16."""
    dtype = state.dtype
    return [
        t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous()
        for t in (state, *others)
    ]


def _with_autocast(options: Options, x: Tensor) -> Options:
    if not torch.is_autocast_enabled(x.device.type):
        return options
    half = torch.get_autocast_dtype(x.device.type)
    return options._replace(autocast="bf16" if half == torch.bfloat16 else "fp16")


def _check_options(options: Options) -> None:
    check_choice("activation", options.activation, ACTIVATIONS)
    check_log_scale(options.log_scale, options.log_scale_constant)


def _check_flow(
    name: str,
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
) -> Tensor:
    _check_options(options)
    steps, dim = matrix.shape[0], matrix.shape[-1]
    if not steps:
        raise ValueError("A holds no step; a flow has one or more")
    check_shape("A_inv" if options.inverse else "A", matrix, (steps, dim, dim), "(steps, dim, dim)")
    check_shape("c", offset, (steps, dim), "(steps, dim)")
    check_shape(name, x, (None, dim), "(batch, dim)")
    n_context = 0
    if context is not None:
        check_floating("context", context)
        check_shape("context", context, (x.shape[0], None), "(batch, context_dim)")
        n_context = context.shape[1]
    check_hidden_layers(weights, biases, steps, dim - dim // 2 + n_context, dim // 2)
    x = check_state(name, x, matrix)
    check_alike((("c", offset), *([("context", context)] if context is not None else [])), x)
    check_alike((("a weight", w) for w in weights), x)
    check_alike((("a bias", b) for b in biases), x)
    return x
