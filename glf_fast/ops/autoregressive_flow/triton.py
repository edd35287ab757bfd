"""The whole autoregressive flow on a GPU (kernels/): one launch in either direction, one backward. Triton is imported when the
first one runs."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.autoregressive_flow.call import Call, CallOptions
from glf_fast.ops.backends import TRITON
from glf_fast.ops.checks import check_fake
from glf_fast.ops.precision import autocast_on, kernel_options

__all__ = ["BACKENDS", "adapt", "backward", "forward", "refuses"]

BACKENDS = (TRITON,)
# All rows and layers pass through memory, so that nothing in a kernel grows with these numbers but its loops. They are the
# largest for which kernels were compiled. Of splines a thread keeps all numbers in registers, as in coupling flows.
MAX_DIM, MAX_HIDDEN, MAX_LAYERS, MAX_SLOPES = 256, 512, 4, 16

OPTIONS = (
    "str activation, float activation_constant, str log_scale, float constant, float[] spline, bool context_layer, "
    "bool inverse, bool density"
)
torch.library.define(
    "glf_fast::triton_autoregressive_flow",
    "(Tensor x, Tensor matrix, Tensor offset, Tensor[] weights, Tensor[] biases, Tensor fan_in, Tensor? context, "
    f"{OPTIONS}, str autocast, bool save) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "glf_fast::triton_autoregressive_flow_backward",
    "(Tensor grad_out, Tensor grad_logdet, Tensor saved, Tensor matrix, Tensor offset, Tensor[] weights, Tensor[] biases, "
    f"Tensor fan_in, Tensor? context, {OPTIONS}, str autocast, bool parameters, bool of_context) -> Tensor[]",
)
operations = torch.ops.glf_fast


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call; "" where they can."""
    options, dim = call.options, call.x.shape[1]
    if options.network != "mlp":
        return "a network other than an MLP"
    hidden = [w.shape[-1] for w in call.weights[: len(call.weights) - 1 - options.context_layer]]
    if dim > MAX_DIM or not 1 <= len(hidden) <= MAX_LAYERS or max(hidden) > MAX_HIDDEN:
        return f"more than {MAX_DIM} columns, or other than 1 to {MAX_LAYERS} hidden layers of up to {MAX_HIDDEN}"
    if options.spline and max(options.spline.bins, options.spline.columns - 2 * options.spline.bins) > MAX_SLOPES:
        return f"splines with more than {MAX_SLOPES} bins or slopes"
    return ""


def adapt(call: Call) -> Call:
    """The call with the precision that torch.autocast asks for."""
    autocast = autocast_on(call.x.device.type)
    return call._replace(options=call.options._replace(autocast=autocast)) if autocast else call


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logdet, which is the density if options.density, and with `keep` what the backward starts from (K, B, D)."""
    x, context, matrix, offset, logabsdet, fan_in, weights, biases, options = call
    out, logdet, saved = operations.triton_autoregressive_flow.default(
        x, matrix, offset, weights, biases, fan_in, context, *_values(options), keep
    )
    return out, logdet if logabsdet is None else logdet + logabsdet, saved


def backward(
    call: Call, state: Tensor, saved: Tensor, grad_out: Tensor | None, grad_logdet: Tensor, parameters: bool, of_context: bool
) -> list[Tensor]:  # fmt: skip
    """The gradients that `AutoregressiveKernels.backward` lists; ∂context is empty unless `of_context`."""
    _, context, matrix, offset, _, fan_in, weights, biases, options = call
    return operations.triton_autoregressive_flow_backward.default(
        state if grad_out is None else grad_out, grad_logdet, saved, matrix, offset, weights, biases, fan_in, context,
        *_values(options), parameters, of_context,
    )  # fmt: skip


def _values(options: CallOptions) -> tuple[str, float, str, float, list[float], bool, bool, bool, str]:
    """The values of OPTIONS, and that of autocast."""
    o = options
    spline = [] if o.spline is None else o.spline.prepared().numbers()
    functions = o.activation, o.activation_constant, o.log_scale, o.constant
    return *functions, spline, o.context_layer, o.inverse, o.density, o.autocast


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------


@torch.library.register_fake("glf_fast::triton_autoregressive_flow")
def _(
    x: Tensor, matrix: Tensor, offset: Tensor, weights: list[Tensor], biases: list[Tensor], fan_in: Tensor,
    context: Tensor | None, activation: str, activation_constant: float,
    log_scale: str, constant: float, spline: list[float], context_layer: bool,
    inverse: bool, density: bool, autocast: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_fake(x)
    return torch.empty_like(x), x.new_empty(x.shape[0]), x.new_empty((len(matrix), *x.shape) if save else 0)


@torch.library.register_fake("glf_fast::triton_autoregressive_flow_backward")
def _(
    grad_out: Tensor, grad_logdet: Tensor, saved: Tensor, matrix: Tensor, offset: Tensor, weights: list[Tensor],
    biases: list[Tensor], fan_in: Tensor, context: Tensor | None, activation: str, activation_constant: float,
    log_scale: str, constant: float,
    spline: list[float], context_layer: bool, inverse: bool, density: bool, autocast: str, parameters: bool,
    of_context: bool,
) -> list[Tensor]:  # fmt: skip
    grad_context = torch.empty_like(context) if of_context and context is not None else grad_out.new_empty(0)
    found = [torch.empty_like(grad_out), grad_context]
    return found + [torch.empty_like(t) for t in (matrix, offset, *weights, *biases) if parameters]


@torch.library.impl("glf_fast::triton_autoregressive_flow", ("cpu", "cuda"))
def _(
    x: Tensor, matrix: Tensor, offset: Tensor, weights: list[Tensor], biases: list[Tensor], fan_in: Tensor,
    context: Tensor | None, activation: str, activation_constant: float,
    log_scale: str, constant: float, spline: list[float], context_layer: bool,
    inverse: bool, density: bool, autocast: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from glf_fast.kernels.autoregressive_flow import autoregressive_forward

    options = kernel_options(
        x, (activation, log_scale, constant, False, inverse), spline, autocast, activation_constant
    )
    return autoregressive_forward(
        x, matrix, offset, weights, biases, fan_in, context, options, context_layer, density, save
    )


@torch.library.impl("glf_fast::triton_autoregressive_flow_backward", ("cpu", "cuda"))
def _(
    grad_out: Tensor, grad_logdet: Tensor, saved: Tensor, matrix: Tensor, offset: Tensor, weights: list[Tensor],
    biases: list[Tensor], fan_in: Tensor, context: Tensor | None, activation: str, activation_constant: float,
    log_scale: str, constant: float,
    spline: list[float], context_layer: bool, inverse: bool, density: bool, autocast: str, parameters: bool,
    of_context: bool,
) -> list[Tensor]:  # fmt: skip
    from glf_fast.kernels.autoregressive_backward import autoregressive_backward

    options = kernel_options(
        grad_out, (activation, log_scale, constant, False, inverse), spline, autocast, activation_constant
    )
    with torch.autocast(grad_out.device.type, enabled=False):  # the precision of its products is decided here
        return autoregressive_backward(
            grad_out, grad_logdet, saved, matrix, offset, weights, biases, fan_in, context, options, context_layer, density,
            parameters, of_context,
        )  # fmt: skip
