"""The coupling flow of K steps, its inverse and its density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glf_fast.ops.backends import kernels_for, recorded, untraced
from glf_fast.ops.checks import (
    check_activation,
    check_alike,
    check_choice,
    check_dropout,
    check_floating,
    check_integer,
    check_log_scale,
    check_network_of,
    check_seed,
    check_shape,
    check_spline,
    check_spline_of,
    check_state,
    check_tensors,
)
from glf_fast.ops.coupling_flow import autograd, cpp, cuda, layered, plain, triton
from glf_fast.ops.coupling_flow.call import Call, CallOptions, Maps
from glf_fast.ops.linear import plu as plu_layers
from glf_fast.reference import COUPLINGS, Plu, Spline, constant_of_activation, layers_of_block, prepared_constant

__all__ = ["coupling_flow", "coupling_flow_inverse", "coupling_flow_log_prob", "plu_flow_log_prob"]

KERNELS = (cuda, triton, layered, cpp)  # in the order of preference


def coupling_flow(
    x: Tensor,
    A: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    *,
    coupling: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    spline: Spline | None = None,
    reversible: bool = False,
    members: int = 1,
    row_scales: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Data → noise through K steps of affine map and affine coupling.

    Step k computes y = x A_k + c_k, splits it into P = D − D//2 passive and D//2 transformed columns (p, v), and returns
    [p, v·e^f(u) + t] with (u, t) = network_k([p, context]).

    Args:
        x: (B, D). A: (K, D, D) and c: (K, D), from `plu_assemble` or any affine maps.
        weights, biases: per linear layer of the networks, from P + C columns on; `coupling` and `network` decide their shapes.
        context: (B, C) or None.
        coupling: "affine", weights (K, nᵢ, nᵢ₊₁) and biases (K, nᵢ₊₁) to 2·(D//2) columns; "separate", (K, 2, nᵢ, nᵢ₊₁) and
            (K, 2, nᵢ₊₁) to D//2 columns: a network for u and one for t; "additive", v + t, as "affine" but to D//2 columns: the
            log-scale means nothing then; "spline", as "affine" but to spline.columns·(D//2) columns, those of one v side by
            side: a rational-quadratic spline of each.
        network: "mlp", or "residual": the layers of `glf_fast.reference.residual`, weights (K, P + C, H), for each block
            (K, H, H), (K, H, H) and with a context (K, C, H), then (K, H, out), and biases alike; not of "separate".
        spline: its kind, see `glf_fast.reference.spline`; for that coupling alone, where None is `Spline()`.
        activation: of the hidden layers. activation_constant: the slope of "leaky_relu" below 0, or α of "elu"; None is
            PyTorch's default. The other options are those of `affine_coupling`.
        reversible: keep nothing for the backward but the output, which rebuilds the steps' inputs by undoing the steps:
            memory independent of K. For the kernels; the reference keeps what autograd keeps.
        members: E flows of one shape in one call. x is then (E·B, D), context (E·B, C), and everything else (E·K, …): first all
            rows, or steps, of the first flow, then those of the second one, …
        row_scales: of each A_k only the scales of its rows are trained, as of a fixed matrix behind an ActNorm. The gradient of
            A is then right for changes of those scales, and in kernels for no others, which saves a product.
        dropout: probability p with which every hidden unit is dropped, behind its activation; the others are divided by 1 − p.
            Residual networks drop behind the second activation of each block. For training: a caller that evaluates passes 0.
        seed: of what is dropped, int64, one element, on x's device or on the processor; needed where p > 0. One seed drops the
            same units in all backends and precisions: those of `glf_fast.reference.Dropout`. Member e of `members` has the seed
            plus e, and its steps and rows are counted from 0.

    Returns:
        z (B, D) and Σ ℓ (B,). The caller adds Σ_k log|det A_k|, one number for the whole batch.

    Raises:
        ValueError, TypeError: shapes, names, dtypes or devices that do not fit; the message says which.
    """
    options = _options(
        coupling, network, activation, activation_constant, log_scale, log_scale_constant, add_first, spline,
        False, reversible, False, False, members, row_scales, dropout,
    )  # fmt: skip
    z, logdet = _run(Call(x, context, Maps(A, c, None), weights, biases, options, _seed(seed) if dropout else None))
    return z, logdet


def coupling_flow_inverse(
    z: Tensor,
    A_inv: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    *,
    coupling: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    spline: Spline | None = None,
    reversible: bool = False,
    members: int = 1,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise → data: undoes `coupling_flow`, given `A_inv` (K, D, D) = A⁻¹; all else as there.

    Returns x (B, D) and −Σ ℓ (B,).
    """
    options = _options(
        coupling, network, activation, activation_constant, log_scale, log_scale_constant, add_first, spline,
        True, reversible, False, False, members, dropout=dropout,
    )  # fmt: skip
    x, logdet = _run(Call(z, context, Maps(A_inv, c, None), weights, biases, options, _seed(seed) if dropout else None))
    return x, logdet


def coupling_flow_log_prob(
    x: Tensor,
    A: Tensor,
    c: Tensor,
    logabsdet: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    *,
    coupling: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    spline: Spline | None = None,
    reversible: bool = False,
    row_scales: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """log p(x) = log N(z; 0, I) + Σ ℓ + `logabsdet` in nats, (B,), with z and Σ ℓ of `coupling_flow`.

    `logabsdet` is Σ_k log|det A_k|, a scalar tensor; all else as in `coupling_flow`.
    """
    options = _options(
        coupling, network, activation, activation_constant, log_scale, log_scale_constant, add_first, spline,
        False, reversible, True, False, row_scales=row_scales, dropout=dropout,
    )  # fmt: skip
    return _run(Call(x, context, Maps(A, c, logabsdet), weights, biases, options, _seed(seed) if dropout else None))[-1]


def plu_flow_log_prob(
    x: Tensor,
    plu: Plu,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None = None,
    *,
    coupling: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    add_first: bool = False,
    spline: Spline | None = None,
    reversible: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`coupling_flow_log_prob` with the affine maps that `plu_assemble` makes of `plu`, its arguments for all K layers.

    One differentiable operation, assembly included: what a training step of a small flow costs is the number of those.
    """
    plu = Plu(*plu)
    options = _options(
        coupling, network, activation, activation_constant, log_scale, log_scale_constant, add_first, spline,
        False, reversible, True, True, dropout=dropout,
    )  # fmt: skip
    call = Call(x, context, plu, weights, biases, options, _seed(seed) if dropout else None)
    try:
        if found := _unchecked(call):
            return found[-1]
        plu_layers.check(plu)
        call = _checked(call)
    except AttributeError:
        _check_tensors(call)
        raise
    kernels = kernels_for(call.x, call, *KERNELS)
    record = recorded((call.x, context, *plu, *weights, *biases))
    whole = kernels is None or (kernels is not layered and record)
    if not whole or (kernels and not kernels_for(plu.lower, plu, plu_layers)):  # then the layers are assembled apart
        A, _, c, logabsdets = plu_layers.run(plu, need_inverse=False)
        call = call._replace(maps=Maps(A, c, logabsdets.sum()), options=options._replace(plu=False))
    return _by(kernels, call)[-1]


# Options that have been checked: what they are takes 1 µs to find out, a fiftieth of what a flow of a single row takes.
_known: dict[tuple[object, ...], CallOptions] = {}


def _options(
    coupling: str,
    network: str,
    activation: str,
    activation_constant: float | None,
    log_scale: str,
    log_scale_constant: float | None,
    add_first: bool,
    spline: Spline | None,
    inverse: bool,
    reversible: bool,
    density: bool,
    plu: bool,
    members: int = 1,
    row_scales: bool = False,
    dropout: float = 0.0,
) -> CallOptions:
    if spline is not None and type(spline) is not Spline:
        check_spline(spline)
    given = (
        coupling, network, activation, activation_constant, log_scale, log_scale_constant, add_first, spline,
        inverse, reversible, density, plu, members, row_scales, dropout,
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()  # to torch.compile the dictionary would be a reason to compile again
    if not compiling and (known := _known.get(given)):
        return known
    check_choice("coupling", coupling, COUPLINGS)
    check_network_of(coupling, network)
    check_activation(activation, activation_constant)
    check_log_scale(log_scale, log_scale_constant)
    check_spline_of(coupling, spline)
    check_integer("members", members, 1)
    if type(row_scales) is not bool:
        raise TypeError(f"row_scales must be True or False; got {row_scales!r}")
    check_dropout(dropout)
    constant = prepared_constant(log_scale, log_scale_constant)
    number = constant_of_activation(activation, activation_constant)
    options = CallOptions(
        coupling, network, activation, number, log_scale, log_scale_constant, add_first, spline, inverse, reversible,
        density, plu, constant, members=members, row_scales=row_scales, dropout=float(dropout),
    )  # fmt: skip
    if coupling == "spline":
        options = options._replace(spline=spline or Spline())
    if not compiling:
        _known[given] = options
    return options


def _seed(seed: Tensor | None) -> Tensor | None:
    """The seed of a call with dropout, once it is known to be one."""
    check_seed(seed)
    return seed


def _run(call: Call) -> tuple[Tensor, ...]:
    """Output and logdet, or the density alone, of maps x A + c."""
    try:
        if found := _unchecked(call):
            return found
        call = _checked(call)
    except AttributeError:
        _check_tensors(call)
        raise
    kernels = kernels_for(call.x, call, *KERNELS)
    if kernels is None and call.options.members > 1:
        return call.by_members(lambda one: _by(kernels_for(one.x, one, *KERNELS), one))
    return _by(kernels, call)


def _unchecked(call: Call) -> tuple[Tensor, ...] | None:
    """The results by the processor's kernels, of arguments that nobody has checked; None where these need it, or a conversion.

    The operations refuse whatever the checks refuse. The checks say why, but take 20 to 40 µs, of 500 in a training pass of one
    row and of 70 in one without gradients (Zen 3).
    """
    x, context, maps, weights, biases, options, seed = call
    if x.device.type != "cpu" or not untraced(x) or len(weights) != len(biases) or kernels_for(x, call, cpp) is None:
        return None
    if isinstance(maps, Plu):
        if x.dtype != maps.lower.dtype or maps.sign.requires_grad:
            return None
    else:
        total = maps.logabsdet
        # An offset that autocast has made is bfloat16. A refusal takes 40 µs.
        if x.dtype != maps.offset.dtype or (total is not None and (total.ndim or total.dtype != x.dtype)):
            return None
    tensors = [x, context, *maps, *weights, *biases] if seed is None else [x, context, *maps, *weights, *biases, seed]
    try:
        for i, tensor in enumerate(tensors):
            if tensor is not None and not tensor.is_contiguous():
                tensors[i] = tensor.contiguous()
        if not (record := recorded(tensors)) and options.plu:
            return None
        found = autograd.take(cpp, options, tensors, record)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return found if found[-1].device == x.device else None  # an argument has no data


def _by(kernels: Any, call: Call) -> tuple[Tensor, ...]:
    """The same by one of KERNELS, or, where that is None, by the reference."""
    if kernels is None:
        return plain.run(call)
    return layered.run(call) if kernels is layered else autograd.run(kernels, call)


def _check_tensors(call: Call) -> None:
    """Raise TypeError where an argument is no tensor."""
    x, context, maps, weights, biases, options, _ = call
    check_tensors(**{"z" if options.inverse else "x": x}, context=context)
    given = maps._fields[: 5 if isinstance(maps, Plu) else 2]
    check_tensors(**{name: t for name, t in maps._asdict().items() if t is not None or name in given})
    check_tensors(
        **{f"weights[{i}]": w for i, w in enumerate(weights)}, **{f"biases[{i}]": b for i, b in enumerate(biases)}
    )


def _checked(call: Call) -> Call:
    """The call with x in the dtype of the maps; raises ValueError or TypeError where anything does not fit.

    PLU factors fit each other already. Tensors are compared in place, and functions called for errors alone: a call for each
    tensor takes longer than the kernels of a small flow.
    """
    x, context, maps, weights, biases, options, seed = call
    if isinstance(maps, Plu):
        like = maps.lower
        if maps.permutation.ndim != 2:
            check_shape("permutation", maps.permutation, (None, None), "(steps, dim)")
        steps, dim = maps.permutation.shape
    else:
        like = maps.matrix
        steps, dim = like.shape[0], like.shape[-1]
        if like.shape != (steps, dim, dim):
            check_shape("A_inv" if options.inverse else "A", like, (steps, dim, dim), "(steps, dim, dim)")
        if maps.offset.shape != (steps, dim):
            check_shape("c", maps.offset, (steps, dim), "(steps, dim)")
        if options.density and maps.logabsdet is not None:
            if maps.logabsdet.shape != ():
                check_shape("logabsdet", maps.logabsdet, (), "()")
            if not maps.logabsdet.is_floating_point():  # a whole number
                call = call._replace(maps=maps._replace(logabsdet=maps.logabsdet.to(like.dtype)))
    if not steps:
        raise ValueError("A holds no step; a flow has one or more")
    name = "z" if options.inverse else "x"
    if x.ndim != 2 or x.shape[1] != dim:
        check_shape(name, x, (None, dim), "(batch, dim)")
    if options.members > 1 and (steps % options.members or x.shape[0] % options.members):
        raise ValueError(
            f"{options.members} members have equally many steps and rows; got {steps} steps and {x.shape[0]} rows of all"
        )
    dtype, device = like.dtype, like.device
    if x.dtype != dtype or x.device != device or dtype not in (torch.float32, torch.float64):
        x = check_state(name, x, like)
    if isinstance(maps, Maps) and (maps.offset.dtype != dtype or maps.offset.device != device):
        check_alike([("c", maps.offset)], x)
    n_in, n_v = dim - dim // 2, dim // 2
    if context is not None:
        check_floating("context", context)
        check_shape("context", context, (x.shape[0], None), "(batch, context_dim)")
        check_alike([("context", context)], x)
        n_in += context.shape[1]

    kind, layers = COUPLINGS[options.coupling], len(weights)
    if layers != len(biases) or not layers:
        raise ValueError(f"weights and biases must be two lists of one length ≥ 1; got {layers} and {len(biases)}")
    size = 0  # of a residual block
    if options.network == "residual":
        size = layers_of_block(context)
        if layers < 2 or (layers - 2) % size:
            raise ValueError(f"weights of a residual network must be two and {size} for each block; got {layers}")
    columns = kind.columns if options.spline is None else options.spline.columns
    stack = (steps,) if kind.networks == 1 else (steps, kind.networks)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        width = columns * n_v if i == layers - 1 else n_in if size and i else weight.shape[-1]
        if size == 3 and i and i % 3 == 0:
            assert context is not None
            n_in = context.shape[1]
        if weight.shape != (*stack, n_in, width) or bias.shape != (*stack, width):
            names = "steps" if kind.networks == 1 else "steps, networks"
            check_shape(f"weights[{i}]", weight, (*stack, n_in, width), f"({names}, in, out)")
            check_shape(f"biases[{i}]", bias, (*stack, width), f"({names}, out)")
        if weight.dtype != dtype or bias.dtype != dtype or weight.device != device or bias.device != device:
            check_alike([("a weight", weight), ("a bias", bias)], x)
        n_in = width
    if seed is not None and seed.device != device:
        if seed.device.type != "cpu":
            raise ValueError(f"seed must be on {device}, as the flow is, or on the processor; it is on {seed.device}")
        call = call._replace(seed=seed.to(device))
    return call if x is call.x else call._replace(x=x)
