"""The whole coupling flow on a GPU (kernels/): one launch forward, one backward. Triton is imported when the first one runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glf_fast.ops import row_products
from glf_fast.ops.backends import TRITON
from glf_fast.ops.checks import check_fake
from glf_fast.ops.coupling_flow import networks
from glf_fast.ops.coupling_flow.call import Call, CallOptions
from glf_fast.ops.coupling_flow.networks import as_one_network, hidden_widths
from glf_fast.ops.precision import autocast_on, kernel_options
from glf_fast.reference import Spline

__all__ = ["BACKENDS", "adapt", "backward", "forward", "refuses"]

BACKENDS = (TRITON,)
MAX_DIM, MAX_HIDDEN, MAX_LAYERS = 256, 512, 4
# Limits of spline flows, which are those of the launch table's entries. A program keeps all numbers of a spline in a thread's
# registers, and those of 32 bins do not fit. It reads 23 columns of the last layer where an affine coupling has 2: at D 128,
# H 512 the weights of a step are 4 MB, which the library's products read once, and every program of 16 rows for itself. Tiles
# of more rows spill from D 64, H 256 on, so that many rows go layer by layer there.
MAX_SPLINE_DIM, MAX_SPLINE_HIDDEN, MAX_SLOPES = 64, 256, 16
ANY_ROWS_DIM, ANY_ROWS_HIDDEN, FEW_ROWS = 32, 64, 4096

OPTIONS = (
    "str activation, float activation_constant, str log_scale, float constant, bool add_first, bool inverse, bool density, "
    "float[] spline"
)
torch.library.define(
    "glf_fast::triton_coupling_flow",
    "(Tensor x, Tensor matrix, Tensor offset, Tensor? logabsdet, Tensor[] weights, Tensor[] biases, Tensor? context, "
    f"{OPTIONS}, str autocast, bool save) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "glf_fast::triton_coupling_flow_backward",
    "(Tensor grad_out, Tensor grad_logdet, Tensor state, Tensor matrix, Tensor? unmatrix, Tensor offset, "
    f"Tensor[] weights, Tensor[] biases, Tensor? context, {OPTIONS}, str autocast, bool parameters, bool of_context) "
    "-> Tensor[]",
)
operations = torch.ops.glf_fast


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call; "" where they can. Wider flows go layer by layer."""
    if why := networks.refuses(call.options, (*networks.KINDS, "spline")):
        return why
    if call.options.dropout:
        return "dropout"
    hidden, dim = hidden_widths(call), call.x.shape[1]
    if call.options.spline is not None:
        return _refuses_splines(dim, hidden, len(call.x), call.options.spline)
    if dim <= MAX_DIM and 1 <= len(hidden) <= MAX_LAYERS and max(hidden) <= MAX_HIDDEN:
        return ""
    return f"more than {MAX_DIM} columns, or other than 1 to {MAX_LAYERS} hidden layers of up to {MAX_HIDDEN}"


def _refuses_splines(dim: int, hidden: Sequence[int], rows: int, spline: Spline) -> str:
    if dim < 2 or dim > MAX_SPLINE_DIM or not 1 <= len(hidden) <= MAX_LAYERS or max(hidden) > MAX_SPLINE_HIDDEN:
        return (
            f"splines of other than 2 to {MAX_SPLINE_DIM} columns, or other than 1 to {MAX_LAYERS} hidden layers of up to "
            f"{MAX_SPLINE_HIDDEN}"
        )
    if max(spline.bins, spline.columns - 2 * spline.bins) > MAX_SLOPES:
        return f"splines with more than {MAX_SLOPES} bins or slopes"
    if rows > FEW_ROWS and (dim > ANY_ROWS_DIM or max(hidden) > ANY_ROWS_HIDDEN):
        return f"splines of more than {ANY_ROWS_DIM} columns or {ANY_ROWS_HIDDEN} hidden units, of more than {FEW_ROWS} rows"
    return ""


def adapt(call: Call) -> Call:
    """The call with one network, and with the precision that torch.autocast asks for."""
    call = call if call.options.spline else as_one_network(call)
    autocast = autocast_on(call.x.device.type)
    return call._replace(options=call.options._replace(autocast=autocast)) if autocast else call


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logdet, which is the density if options.density, and with `keep` the steps' inputs (K, B, D)."""
    x, context, (matrix, offset, logabsdet), weights, biases, options, _ = call
    return operations.triton_coupling_flow.default(
        x, matrix, offset, logabsdet, weights, biases, context, *_values(options), keep
    )


def backward(
    call: Call, state: Tensor, saved: Tensor, unmatrix: Tensor | None, grad_out: Tensor | None, grad_logdet: Tensor,
    parameters: bool, of_context: bool, of_matrix: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients that `FlowKernels.backward` lists; ∂context is empty unless `of_context`; ∂matrix is made in any case."""
    _, context, (matrix, offset, _), weights, biases, options, _ = call
    return operations.triton_coupling_flow_backward.default(
        state if grad_out is None else grad_out, grad_logdet, saved if unmatrix is None else state, matrix, unmatrix,
        offset, weights, biases, context, *_values(options), parameters, of_context,
    )  # fmt: skip


def _values(options: CallOptions) -> tuple[str, float, str, float, bool, bool, bool, list[float], str]:
    """The values of OPTIONS, and that of autocast."""
    o = options
    spline = [] if o.spline is None else o.spline.prepared().numbers()
    functions = o.activation, o.activation_constant, o.log_scale, o.constant
    return *functions, o.add_first, o.inverse, o.density, spline, o.autocast


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------


@torch.library.register_fake("glf_fast::triton_coupling_flow")
def _(
    x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None, weights: list[Tensor], biases: list[Tensor],
    context: Tensor | None, activation: str, activation_constant: float,
    log_scale: str, constant: float, add_first: bool, inverse: bool,
    density: bool, spline: list[float], autocast: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_fake(x)
    saved = x.new_empty((len(matrix), *x.shape) if save else 0)
    return torch.empty_like(x), x.new_empty(x.shape[0]), saved


@torch.library.register_fake("glf_fast::triton_coupling_flow_backward")
def _(
    grad_out: Tensor, grad_logdet: Tensor, state: Tensor, matrix: Tensor, unmatrix: Tensor | None, offset: Tensor,
    weights: list[Tensor], biases: list[Tensor], context: Tensor | None,
    activation: str, activation_constant: float,
    log_scale: str, constant: float, add_first: bool, inverse: bool, density: bool,
    spline: list[float], autocast: str, parameters: bool, of_context: bool,
) -> list[Tensor]:  # fmt: skip
    grads = [
        torch.empty_like(grad_out),
        torch.empty_like(context) if of_context and context is not None else grad_out.new_empty(0),
    ]
    of_density = [grad_out.new_empty(len(matrix))] if density else []
    return grads + [torch.empty_like(t) for t in (matrix, offset, *of_density, *weights, *biases) if parameters]


@torch.library.impl("glf_fast::triton_coupling_flow", ("cpu", "cuda"))
def _(
    x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None, weights: list[Tensor], biases: list[Tensor],
    context: Tensor | None, activation: str, activation_constant: float,
    log_scale: str, constant: float, add_first: bool, inverse: bool,
    density: bool, spline: list[float], autocast: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from glf_fast.kernels.coupling_flow import flow_forward

    options = kernel_options(
        x, (activation, log_scale, constant, add_first, inverse), spline, autocast, activation_constant
    )
    return flow_forward(x, matrix, offset, logabsdet, weights, biases, context, options, density, save)


@torch.library.impl("glf_fast::triton_coupling_flow_backward", ("cpu", "cuda"))
def _(
    grad_out: Tensor, grad_logdet: Tensor, state: Tensor, matrix: Tensor, unmatrix: Tensor | None, offset: Tensor,
    weights: list[Tensor], biases: list[Tensor], context: Tensor | None,
    activation: str, activation_constant: float,
    log_scale: str, constant: float, add_first: bool, inverse: bool, density: bool,
    spline: list[float], autocast: str, parameters: bool, of_context: bool,
) -> list[Tensor]:  # fmt: skip
    from glf_fast.kernels.coupling_flow_backward import flow_backward

    names = (activation, log_scale, constant, add_first, inverse)
    options = kernel_options(grad_out, names, spline, autocast, activation_constant)
    with torch.autocast(grad_out.device.type, enabled=False):  # the precision of its products is decided here
        return flow_backward(
            grad_out,
            grad_logdet,
            state,
            matrix,
            unmatrix,
            offset,
            weights,
            biases,
            context,
            options,
            density,
            parameters,
            of_context,
            one_launch=row_products.ready(grad_out),
        )
