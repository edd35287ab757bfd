"""The masked autoregressive flow of K steps, its inverse and its density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glf_fast.ops.autoregressive_flow import autograd, cpp, plain, triton
from glf_fast.ops.autoregressive_flow.call import Call, CallOptions
from glf_fast.ops.backends import kernels_for, ordinary, recorded, untraced
from glf_fast.ops.checks import (
    check_activation,
    check_alike,
    check_choice,
    check_device,
    check_floating,
    check_log_scale,
    check_shape,
    check_spline,
    check_state,
    check_tensors,
)
from glf_fast.reference import MASKED_NETWORKS, TRANSFORMS, Spline, constant_of_activation, prepared_constant

__all__ = ["autoregressive_flow", "autoregressive_flow_inverse", "autoregressive_flow_log_prob"]

KERNELS = (cpp, triton)  # in the order of preference


def autoregressive_flow(
    x: Tensor,
    A: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    fan_in: Tensor,
    context: Tensor | None = None,
    *,
    transform: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    spline: Spline | None = None,
    context_layer: bool = False,
) -> tuple[Tensor, Tensor]:
    """Data → noise through K steps of affine map and masked autoregressive transform.

    Step k computes y = x A_k + c_k, the parameters θ_d of every feature d from those before it, y_<d, and the context by a
    masked network, and returns T(y_d; θ_d): v·e^f(u) + t of θ = (u, t), or a rational-quadratic spline.

    Args:
        x: (B, D). A: (K, D, D) and c: (K, D), from `plu_assemble` or any affine maps.
        weights, biases: per linear layer of the networks, (K, rows, columns) and (K, columns). Rows are those of the context
            (C, where it enters the layer), then the layer's own inputs: first D, last columns n·D, those of a feature side by
            side, [u, t] or `spline.columns`. It enters the first layer, or with `context_layer` a layer of its own, whose
            (K, C, H₁) and (K, H₁) come last; and the first layer of each block of a "residual" network.
        fan_in: (K, H₁ + … + D), int64: how many units of the layer before each hidden unit sees, layer by layer, and how many
            of the last hidden layer each feature's parameters. Sorted within a layer, and such that no feature depends on
            itself or on one behind it. Weights beyond are never read, and their gradients are zero.
        context: (B, C) or None.
        transform: "affine" or "spline". network: "mlp", or Linear, blocks of two, Linear: "residual" or "skip", see
            `glf_fast.reference.made`. activation, activation_constant: of the hidden layers, as in `coupling_flow`.
        log_scale, log_scale_constant: f, see `glf_fast.reference.log_scale`. spline: its kind; None is `Spline()`.

    Returns:
        z (B, D) and Σ log T' (B,). The caller adds Σ_k log|det A_k|, one number for the whole batch.

    Raises:
        ValueError, TypeError: shapes, names, dtypes or devices that do not fit; the message says which.

    Sources: Papamakarios et al., arXiv:1705.07057; Germain et al., arXiv:1502.03509.
    """
    options = _options(
        transform, network, activation, activation_constant, log_scale, log_scale_constant, spline, context_layer,
        False, False,
    )  # fmt: skip
    z, logdet = _run(Call(x, context, A, c, None, fan_in, weights, biases, options))
    return z, logdet


def autoregressive_flow_inverse(
    z: Tensor,
    A_inv: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    fan_in: Tensor,
    context: Tensor | None = None,
    *,
    transform: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    spline: Spline | None = None,
    context_layer: bool = False,
) -> tuple[Tensor, Tensor]:
    """Noise → data: undoes `autoregressive_flow`, given `A_inv` (K, D, D) = A⁻¹; all else as there.

    In the kernels at the cost of one pass: as soon as a feature is known, the hidden units that see it, and no others, are
    computed. Its gradients cost one pass, too, by the implicit function: a triangular system, solved in the reverse order.

    Returns x (B, D) and −Σ log T' (B,).
    """
    options = _options(
        transform, network, activation, activation_constant, log_scale, log_scale_constant, spline, context_layer,
        True, False,
    )  # fmt: skip
    x, logdet = _run(Call(z, context, A_inv, c, None, fan_in, weights, biases, options))
    return x, logdet


def autoregressive_flow_log_prob(
    x: Tensor,
    A: Tensor,
    c: Tensor,
    logabsdet: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    fan_in: Tensor,
    context: Tensor | None = None,
    *,
    transform: str = "affine",
    network: str = "mlp",
    activation: str = "relu",
    activation_constant: float | None = None,
    log_scale: str = "tanh",
    log_scale_constant: float | None = None,
    spline: Spline | None = None,
    context_layer: bool = False,
) -> Tensor:
    """log p(x) = log N(z; 0, I) + Σ log T' + `logabsdet` in nats, (B,), with z and the sum of `autoregressive_flow`.

    `logabsdet` is Σ_k log|det A_k|, a scalar tensor; all else as there.
    """
    options = _options(
        transform, network, activation, activation_constant, log_scale, log_scale_constant, spline, context_layer,
        False, True,
    )  # fmt: skip
    return _run(Call(x, context, A, c, logabsdet, fan_in, weights, biases, options))[0]


# Options that have been checked: finding out what they are takes longer than the rest of the check.
_known: dict[tuple[object, ...], CallOptions] = {}


def _options(
    transform: str,
    network: str,
    activation: str,
    activation_constant: float | None,
    log_scale: str,
    log_scale_constant: float | None,
    spline: Spline | None,
    context_layer: bool,
    inverse: bool,
    density: bool,
) -> CallOptions:
    if spline is not None and type(spline) is not Spline:
        check_spline(spline)
    given = (
        transform, network, activation, activation_constant, log_scale, log_scale_constant, spline, context_layer,
        inverse, density,
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()  # to torch.compile the dictionary would be a reason to compile again
    if not compiling and (known := _known.get(given)):
        return known
    check_choice("transform", transform, TRANSFORMS)
    check_choice("network", network, MASKED_NETWORKS)
    check_activation(activation, activation_constant)
    check_log_scale(log_scale, log_scale_constant)
    if spline is not None:
        check_spline(spline)
        if transform != "spline":
            raise ValueError(f'spline is for transform="spline"; got {spline!r} with transform={transform!r}')
    number = constant_of_activation(activation, activation_constant)
    options = CallOptions(
        transform, network, activation, number, log_scale, log_scale_constant, spline, context_layer, inverse, density,
        prepared_constant(log_scale, log_scale_constant),
    )  # fmt: skip
    if transform == "spline":
        options = options._replace(spline=spline or Spline())
    if not compiling:
        _known[given] = options
    return options


def _run(call: Call) -> tuple[Tensor, ...]:
    """Output and logdet, or the density alone."""
    try:
        if found := _unchecked(call):
            return found
        call = _checked(call)
    except AttributeError:
        _check_tensors(call)
        raise
    kernels: Any = kernels_for(call.x, call, *KERNELS)
    if kernels:
        return autograd.run(kernels, call)
    if call.x.device.type == "cpu" and ordinary():  # as the kernels do; a GPU would wait for it
        _check_autoregressive(call)
    return plain.run(call)


def _unchecked(call: Call) -> tuple[Tensor, ...] | None:
    """The results by the processor's kernels, of arguments that nobody has checked; None where these need it, or a conversion.

    The operation refuses whatever the checks refuse, as that of a coupling flow does.
    """
    x, *tensors, weights, biases, options = call
    if x.device.type != "cpu" or not untraced(x) or len(weights) != len(biases) or kernels_for(x, call, cpp) is None:
        return None
    if x.dtype != call.offset.dtype:
        return None
    if (total := call.logabsdet) is not None and (total.ndim or total.dtype != x.dtype):
        return None
    tensors = [x, *tensors, *weights, *biases]
    try:
        for i, tensor in enumerate(tensors):
            if tensor is not None and not tensor.is_contiguous():
                tensors[i] = tensor.contiguous()
        found = autograd.take(cpp, options, tensors, recorded(tensors))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return found if found[-1].device == x.device else None  # an argument has no data


def _check_autoregressive(call: Call) -> None:
    """Raise ValueError where `fan_in` is not sorted, out of bounds, or lets a feature depend on itself."""
    dim, options = call.x.shape[1], call.options
    layers = len(call.weights) - options.context_layer
    reach: list[Tensor] = [torch.arange(1, dim + 1).expand(len(call.matrix), -1)]  # features that a unit depends on
    valid = True
    for i, seen in enumerate(call.fan_in.split([*(b.shape[1] for b in call.biases[: layers - 1]), dim], 1)):
        width = reach[-1].shape[1]
        valid &= bool((seen >= 0).all() and (seen <= width).all() and (seen.diff(dim=1) >= 0).all())
        found = F.pad(reach[-1], (1, 0)).gather(1, seen.clamp(0, width))
        if options.network != "mlp" and i % 2 == 0 and 2 <= i < layers - 1:
            found = torch.maximum(found, reach[-2])
        reach.append(found)
    if not valid or bool((reach[-1] >= reach[0]).any()):
        raise ValueError(
            "fan_in must be sorted within each layer, at most the layer before is wide, and let no feature depend on itself or "
            "on one behind it"
        )


def _check_tensors(call: Call) -> None:
    """Raise TypeError where an argument is no tensor."""
    check_tensors(**{"z" if call.options.inverse else "x": call.x}, context=call.context)
    check_tensors(**{"A_inv" if call.options.inverse else "A": call.matrix}, c=call.offset, fan_in=call.fan_in)
    check_tensors(**{f"weights[{i}]": w for i, w in enumerate(call.weights)})
    check_tensors(**{f"biases[{i}]": b for i, b in enumerate(call.biases)})


def _checked(call: Call) -> Call:
    """The call with x in the dtype of the maps; raises ValueError or TypeError where anything does not fit.

    Tensors are compared in place, and functions called for errors alone, as for coupling flows.
    """
    x, context, matrix, offset, logabsdet, fan_in, weights, biases, options = call
    steps, dim, dtype, device = matrix.shape[0], matrix.shape[-1], matrix.dtype, matrix.device
    if matrix.shape != (steps, dim, dim):
        check_shape("A_inv" if options.inverse else "A", matrix, (steps, dim, dim), "(steps, dim, dim)")
    if not steps or not dim:
        raise ValueError(f"A must be (steps, dim, dim) with one or more steps and features; got {tuple(matrix.shape)}")
    if offset.shape != (steps, dim):
        check_shape("c", offset, (steps, dim), "(steps, dim)")
    if logabsdet is not None and logabsdet.shape != ():
        check_shape("logabsdet", logabsdet, (), "()")
    name = "z" if options.inverse else "x"
    if x.ndim != 2 or x.shape[1] != dim:
        check_shape(name, x, (None, dim), "(batch, dim)")
    if x.dtype != dtype or x.device != device or dtype not in (torch.float32, torch.float64):
        x = check_state(name, x, matrix)
    context_dim = 0
    if context is not None:
        check_floating("context", context)
        check_shape("context", context, (x.shape[0], None), "(batch, context_dim)")
        check_alike([("context", context)], x)
        context_dim = context.shape[1]
    if options.context_layer and not context_dim:
        given = "None" if context is None else f"shape {tuple(context.shape)}"
        raise ValueError(f"context_layer=True is for networks with a context of one or more columns; got {given}")

    residual, own = options.network != "mlp", options.context_layer
    layers = len(weights) - own
    if len(weights) != len(biases) or layers < 1 or (residual and layers % 2):
        wanted = "two and two for each block" if residual else "one or more"
        raise ValueError(
            f"weights and biases must be two lists of {wanted}{', and the context layer' * own}; got {len(weights)} and "
            f"{len(biases)}"
        )
    columns = options.spline.columns if options.spline is not None else TRANSFORMS[options.transform]
    units, n_in = 0, dim
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        in_block = options.network == "residual" and i % 2 == 1 and i + 1 < layers
        enters = context_dim * (in_block if i else not own)
        width = columns * dim if i + 1 == layers else (weights if residual or i == layers else (weight,))[0].shape[-1]
        rows = context_dim if i == layers else n_in + enters
        if weight.shape != (steps, rows, width) or bias.shape != (steps, width):
            check_shape(f"weights[{i}]", weight, (steps, rows, width), "(steps, in, out)")
            check_shape(f"biases[{i}]", bias, (steps, width), "(steps, out)")
        if weight.dtype != dtype or bias.dtype != dtype or weight.device != device or bias.device != device:
            check_alike([(f"weights[{i}]", weight), (f"biases[{i}]", bias)], x)
        n_in = width
        units += width if i + 1 < layers else 0
    if offset.dtype != dtype or offset.device != device:
        check_alike([("c", offset)], x)
    if fan_in.shape != (steps, units + dim):
        check_shape("fan_in", fan_in, (steps, units + dim), "(steps, hidden units + dim)")
    if fan_in.dtype != torch.int64:
        raise TypeError(f"fan_in must be int64; got {fan_in.dtype}")
    if fan_in.device != device:
        check_device([("fan_in", fan_in)], device)
    return call if x is call.x else call._replace(x=x)
