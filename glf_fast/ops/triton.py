"""The whole coupling flow on a GPU (kernels/) as a differentiable function: one launch forward, one backward.

First derivatives come from the kernels, second ones from the reference. Triton is imported when the first kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glf_fast.ops.differentiate import differentiate_flow
from glf_fast.ops.options import Options

if TYPE_CHECKING:
    from glf_fast.kernels.flow_options import FlowOptions

__all__ = ["coupling_flow", "fits"]

MAX_DIM, MAX_HIDDEN, MAX_LAYERS = 256, 512, 4

OPTIONS = "str activation, str log_scale, float constant, bool add_first, bool inverse, str autocast"
torch.library.define(
    "glf_fast::triton_coupling_flow",
    "(Tensor x, Tensor matrix, Tensor offset, Tensor[] weights, Tensor[] biases, Tensor? context, "
    f"{OPTIONS}, bool save) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "glf_fast::triton_coupling_flow_backward",
    "(Tensor grad_out, Tensor grad_logdet, Tensor state, Tensor matrix, Tensor? unmatrix, Tensor offset, "
    f"Tensor[] weights, Tensor[] biases, Tensor? context, {OPTIONS}, bool parameters) -> Tensor[]",
)
ops = torch.ops.glf_fast


def fits(dim: int, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels take D and these stacked weights: wider flows go layer by layer."""
    hidden = [weight.shape[2] for weight in weights[:-1]]
    return dim <= MAX_DIM and 1 <= len(hidden) <= MAX_LAYERS and max(hidden) <= MAX_HIDDEN


def coupling_flow(
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    options: Options,
    reversible: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.coupling_flow`, or `coupling_flow_inverse` with options.inverse.

    The arguments are checked, of one dtype and contiguous.
    """
    autocast = ""
    if torch.is_autocast_enabled(x.device.type):
        autocast = "bf16" if torch.get_autocast_dtype(x.device.type) == torch.bfloat16 else "fp16"
    tensors = (x, matrix, offset, context, *weights, *biases)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, logdet = _CouplingFlow.apply(options, autocast, reversible, *tensors)
        return out, logdet
    code = _code(options, autocast)
    out, logdet, _ = ops.triton_coupling_flow.default(x, matrix, offset, weights, biases, context, *code, False)
    return out, logdet


def _code(options: Options, autocast: str) -> tuple[str, str, float, bool, bool, str]:
    """OPTIONS of the operations."""
    return options.activation, options.log_scale, options.constant, options.add_first, options.inverse, autocast


class _CouplingFlow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: Options, autocast: str, reversible: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, matrix, offset, context, *layers = tensors
        weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        code = _code(options, autocast)
        out, logdet, saved = ops.triton_coupling_flow.default(
            x, matrix, offset, weights, biases, context, *code, not reversible
        )
        ctx.options, ctx.code, ctx.reversible = options, code, reversible
        # The backward starts from the steps' inputs, or rebuilds them from the output.
        ctx.save_for_backward(out if reversible else saved, *tensors)
        return out, logdet

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        state, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return None, None, None, *differentiate_flow(ctx.options, inputs, needs, grads)
        _, matrix, offset, context, *layers = inputs
        weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        parameters = any(needs[1:3]) or any(needs[4:])
        unmatrix = torch.linalg.inv_ex(matrix).inverse.contiguous() if ctx.reversible else None
        grad_out, grad_logdet = (g.contiguous() for g in grads)
        grad_x, grad_context, *grad_parameters = ops.triton_coupling_flow_backward.default(
            grad_out, grad_logdet, state, matrix, unmatrix, offset, weights, biases, context, *ctx.code, parameters
        )
        if not parameters:
            grad_parameters = [None] * (2 + len(layers))
        return (
            None,
            None,
            None,
            grad_x,
            *grad_parameters[:2],
            None if context is None else grad_context,
            *grad_parameters[2:],
        )


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------


@torch.library.register_fake("glf_fast::triton_coupling_flow")
def _(
    x: Tensor, matrix: Tensor, offset: Tensor, weights: list[Tensor], biases: list[Tensor], context: Tensor | None,
    activation: str, log_scale: str, constant: float, add_first: bool, inverse: bool, autocast: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    saved = x.new_empty((len(matrix), *x.shape) if save else 0)
    return torch.empty_like(x), x.new_empty(len(x)), saved


@torch.library.register_fake("glf_fast::triton_coupling_flow_backward")
def _(
    grad_out: Tensor, grad_logdet: Tensor, state: Tensor, matrix: Tensor, unmatrix: Tensor | None, offset: Tensor,
    weights: list[Tensor], biases: list[Tensor], context: Tensor | None,
    activation: str, log_scale: str, constant: float, add_first: bool, inverse: bool, autocast: str, parameters: bool,
) -> list[Tensor]:  # fmt: skip
    grads = [torch.empty_like(grad_out), grad_out.new_empty(0) if context is None else torch.empty_like(context)]
    return grads + [torch.empty_like(t) for t in (matrix, offset, *weights, *biases) if parameters]


@torch.library.impl("glf_fast::triton_coupling_flow", ("cpu", "cuda"))
def _(
    x: Tensor, matrix: Tensor, offset: Tensor, weights: list[Tensor], biases: list[Tensor], context: Tensor | None,
    activation: str, log_scale: str, constant: float, add_first: bool, inverse: bool, autocast: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from glf_fast.kernels.coupling_flow import flow_forward

    options = _flow_options(x, (activation, log_scale, constant, add_first, inverse), autocast)
    return flow_forward(x, matrix, offset, weights, biases, context, options, save)


@torch.library.impl("glf_fast::triton_coupling_flow_backward", ("cpu", "cuda"))
def _(
    grad_out: Tensor, grad_logdet: Tensor, state: Tensor, matrix: Tensor, unmatrix: Tensor | None, offset: Tensor,
    weights: list[Tensor], biases: list[Tensor], context: Tensor | None,
    activation: str, log_scale: str, constant: float, add_first: bool, inverse: bool, autocast: str, parameters: bool,
) -> list[Tensor]:  # fmt: skip
    from glf_fast.kernels.coupling_flow_backward import flow_backward

    options = _flow_options(grad_out, (activation, log_scale, constant, add_first, inverse), autocast)
    with torch.autocast(grad_out.device.type, enabled=False):  # the precision of its products is decided here
        return flow_backward(
            grad_out, grad_logdet, state, matrix, unmatrix, offset, weights, biases, context, options, parameters
        )


def _flow_options(x: Tensor, names: tuple[str, str, float, bool, bool], autocast: str) -> FlowOptions:
    """Names and precisions. Read here, not in Python that torch.compile traces: it cannot read the matmul precision.

    The affine maps stay at tf32 or better, because a bf16 A would not match its A⁻¹. Under a float16 autocast the
    conditioner's products are tf32, which has float16's mantissa and float32's range.
    """
    from glf_fast.kernels.flow_options import FULL_PRECISION, FlowOptions

    if x.dtype == torch.float64:
        return FlowOptions(*names, "ieee", "ieee")
    setting = torch.get_float32_matmul_precision()
    maps = FULL_PRECISION if setting == "highest" else "tf32"
    mlps = {"": "bf16" if setting == "medium" else maps, "bf16": "bf16", "fp16": "tf32"}[autocast]
    return FlowOptions(*names, maps, mlps)
