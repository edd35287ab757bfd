"""Small and medium coupling flows on a GPU by the CUDA kernels of csrc/cuda.

Of a small flow a warp takes 16 rows through all steps (flow_kernels.cuh). Of a medium one a cluster of blocks does, from sm_90
on (cluster_kernels.cuh).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from glf_fast.ops.backends import CUDA
from glf_fast.ops.checks import check_fake
from glf_fast.ops.coupling_flow import cluster, networks, small
from glf_fast.ops.coupling_flow.call import Call, CallOptions
from glf_fast.ops.coupling_flow.networks import as_one_network, hidden_widths
from glf_fast.ops.coupling_flow.small import BF16, FLOAT32, TF32, FlowShape, Options
from glf_fast.ops.precision import autocast_on
from glf_fast.reference import constant_of_activation

__all__ = ["BACKENDS", "adapt", "backward", "forward", "refuses", "shape_of"]

BACKENDS = () if CUDA.missing else (CUDA,)  # missing, it is not asked for: Triton's kernels take all that these take
MAX_DIM, MAX_HIDDEN, MAX_CONTEXT = 32, 64, 64
# Where these kernels are chosen and Triton's are not, by predicted times (tools/small_flow_costs.py; nothing was measured).
# Up to here the rows fill the multiprocessors of an H100 once, with 8 warps each. Beyond, both kinds are bound by the matrix
# units, and Triton's need less workspace.
MAX_ROWS = 16_384
MAX_CLUSTER_DIM, MAX_CLUSTER_HIDDEN = 128, 512  # of medium flows
MAX_WORKSPACE = 48 << 20  # bytes that a forward may keep for its backward: the L2 cache of an H100

OPTIONS = (
    "str activation, str log_scale, float constant, bool add_first, bool inverse, bool density, int map_precision, "
    "int mlp_precision"
)
torch.library.define(
    "glf_fast::cuda_coupling_flow",
    "(Tensor x, Tensor matrix, Tensor offset, Tensor? logabsdet, Tensor[] weights, Tensor[] biases, Tensor? context, "
    f"{OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "glf_fast::cuda_coupling_flow_backward",
    "(Tensor? grad_out, Tensor grad_logdet, Tensor out, Tensor saved, Tensor matrix, Tensor offset, Tensor[] weights, "
    f"Tensor[] biases, Tensor? context, {OPTIONS}, bool parameters, bool of_context) -> Tensor[]",
)
operations = torch.ops.glf_fast


def refuses(call: Call) -> str:
    """Why these kernels cannot take the call, or why Triton's are faster; "" where they are chosen."""
    x, context, _, weights, biases, options, _ = call
    if why := networks.refuses(options, networks.KINDS):
        return why
    if options.dropout:
        return "dropout"
    if options.activation not in small.ACTIVATIONS or options.log_scale not in small.LOG_SCALES:
        return "csrc/cuda has no such activation or log-scale"
    if options.activation_constant != constant_of_activation(options.activation, None):
        return "an activation with a constant other than its default, which is in the kernels"
    hidden, dim = hidden_widths(call), x.shape[1]
    if x.dtype != torch.float32:
        return "float64"
    if not 2 <= dim <= MAX_CLUSTER_DIM or not 1 <= len(hidden) <= small.MOST_LAYERS or max(hidden) > MAX_CLUSTER_HIDDEN:
        return (
            f"other than 2 to {MAX_CLUSTER_DIM} columns, or other than 1 to {small.MOST_LAYERS} hidden layers of up to "
            f"{MAX_CLUSTER_HIDDEN}"
        )
    if context is not None and context.shape[1] > MAX_CONTEXT:
        return f"more than {MAX_CONTEXT} columns of context"
    s = shape_of(call)
    medium = s.blocks > 1
    gradients = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, context, *call.maps, *weights, *biases)
    )
    if x.shape[0] > (most := cluster.most_rows(s, gradients) if medium else MAX_ROWS):
        return f"more than {most} rows"
    if gradients:
        if options.inverse or options.reversible:
            return "gradients of an inverse, or ones that rebuild the steps' inputs"
        if 4 * sum(small.kept_numbers(s, options.activation, x.shape[0])) > MAX_WORKSPACE:
            return f"gradients that need more than {MAX_WORKSPACE >> 20} MiB of workspace"
    shared = _shared_bytes(x.device.index or 0, medium)
    if medium and not shared:
        return "a GPU without clusters of blocks"
    if (cluster.shared_bytes(s, 2) if medium else 2 * max(small.unit_bytes(s)) + 64) > shared:
        of = "units" if medium else "steps"
        return f"the weights of two {of} do not fit into the shared memory of this GPU"
    return ""


def _shared_bytes(index: int, clusters: bool) -> int:
    """Bytes of shared memory that a block may ask for.

    0 on GPUs whose matrix units know neither tf32 nor bfloat16, or if asked so on those without clusters.
    """
    return _shared_bytes_once(index, clusters)


@cache
def _shared_bytes_once(index: int, clusters: bool) -> int:
    gpu = torch.cuda.get_device_properties(index)
    oldest = 9 if clusters else 8
    return int(gpu.shared_memory_per_block_optin) if gpu.major >= oldest else 0  # type: ignore[attr-defined]


def _matmul_precision() -> str:
    """torch's setting. A compiled graph keeps what it found, so that both of its passes agree."""
    return torch.get_float32_matmul_precision()


# torch.compile cannot trace either, and takes the answer for a constant. The public decorator for this, torch.compiler's
# assume_constant_result, sets the same attribute, but imports torch._dynamo, a second at every import of glf_fast.
for _function in (_shared_bytes, _matmul_precision):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010  mypy knows no such attribute


def shape_of(call: Call) -> FlowShape:
    """Sizes of the call's flow, as one network, and the precisions that are asked for now."""
    return _shape(call, *_precisions(_asked(call.x)))


def _shape(call: Call, map_precision: int, mlp_precision: int) -> FlowShape:
    """Sizes of the call's flow, as one network."""
    context = 0 if call.context is None else call.context.shape[1]
    steps, (rows, dim), hidden = call.weights[0].shape[0], call.x.shape, tuple(hidden_widths(call))
    return FlowShape(steps, dim, context, hidden, map_precision, mlp_precision, _blocks(dim, hidden, rows))


def _blocks(dim: int, hidden: Sequence[int], rows: int) -> int:
    """The blocks of a cluster that shares rows; 1 for a small flow."""
    if dim <= MAX_DIM and max(hidden) <= MAX_HIDDEN:
        return 1
    return 8


def adapt(call: Call) -> Call:
    """The call with one network, and with the precisions of its products.

    Those of kernels/README.md, with a map in float32 wherever the network is not in its precision: bfloat16 networks have one
    kernel, and tf32 ones under a float16 autocast are computed in float32.
    """
    call = as_one_network(call)
    return call._replace(options=call.options._replace(autocast=_asked(call.x)))


def _asked(x: Tensor) -> str:
    """The precision that autocast or torch's setting asks for."""
    return autocast_on(x.device.type) or {"medium": "bf16", "high": "tf32"}.get(_matmul_precision(), "fp32")


def _precisions(asked: str) -> tuple[int, int]:
    """The precisions of maps and networks."""
    return {"bf16": (FLOAT32, BF16), "tf32": (TF32, TF32)}.get(asked, (FLOAT32, FLOAT32))


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logdet, which is the density if options.density, and with `keep` the workspace of the backward."""
    x, context, (matrix, offset, logabsdet), weights, biases, options, _ = call
    return operations.cuda_coupling_flow.default(
        x, matrix, offset, logabsdet, weights, biases, context, *_values(options), keep
    )


def backward(
    call: Call, state: Tensor, saved: Tensor, unmatrix: Tensor | None, grad_out: Tensor | None, grad_logdet: Tensor,
    parameters: bool, of_context: bool, of_matrix: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients that `FlowKernels.backward` lists; ∂context is empty unless `of_context`; ∂matrix is made in any case.

    Of a density from its output `state`, else from `grad_out`; `state` then only has the output's shape.
    """
    assert unmatrix is None
    _, context, (matrix, offset, _), weights, biases, options, _ = call
    return operations.cuda_coupling_flow_backward.default(
        grad_out, grad_logdet, state, saved, matrix, offset, weights, biases, context, *_values(options), parameters,
        of_context,
    )  # fmt: skip


def _values(options: CallOptions) -> tuple[str, str, float, bool, bool, bool, int, int]:
    """The values of OPTIONS."""
    o = options
    return o.activation, o.log_scale, o.constant, o.add_first, o.inverse, o.density, *_precisions(o.autocast)


def _shape_of(
    x: Tensor, matrix: Tensor, weights: list[Tensor], context: Tensor | None, map_precision: int, mlp_precision: int
) -> FlowShape:
    columns, (rows, dim) = 0 if context is None else context.shape[1], x.shape
    hidden = tuple(w.shape[2] for w in weights[:-1])
    return FlowShape(len(matrix), dim, columns, hidden, map_precision, mlp_precision, _blocks(dim, hidden, rows))


# -- the operations: what torch.compile sees ---------------------------------------------------------------------------


@torch.library.register_fake("glf_fast::cuda_coupling_flow")
def _(
    x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None, weights: list[Tensor], biases: list[Tensor],
    context: Tensor | None, activation: str, log_scale: str, constant: float, add_first: bool, inverse: bool,
    density: bool, map_precision: int, mlp_precision: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_fake(x)
    s = _shape_of(x, matrix, weights, context, map_precision, mlp_precision)
    saved = x.new_empty(sum(small.kept_numbers(s, activation, x.shape[0])) if keep else 0)
    return torch.empty_like(x), x.new_empty(x.shape[0]), saved


@torch.library.register_fake("glf_fast::cuda_coupling_flow_backward")
def _(
    grad_out: Tensor | None, grad_logdet: Tensor, out: Tensor, saved: Tensor, matrix: Tensor, offset: Tensor,
    weights: list[Tensor], biases: list[Tensor], context: Tensor | None, activation: str, log_scale: str,
    constant: float, add_first: bool, inverse: bool, density: bool, map_precision: int, mlp_precision: int,
    parameters: bool, of_context: bool,
) -> list[Tensor]:  # fmt: skip
    grads = [
        torch.empty_like(out),
        torch.empty_like(context) if of_context and context is not None else out.new_empty(0),
    ]
    of_density = [out.new_empty(len(matrix))] if density else []
    return grads + [torch.empty_like(t) for t in (matrix, offset, *of_density, *weights, *biases) if parameters]


# Also on a processor, where tests run the kernels.
@torch.library.impl("glf_fast::cuda_coupling_flow", ("cpu", "cuda"))
def _(
    x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None, weights: list[Tensor], biases: list[Tensor],
    context: Tensor | None, activation: str, log_scale: str, constant: float, add_first: bool, inverse: bool,
    density: bool, map_precision: int, mlp_precision: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    s = _shape_of(x, matrix, weights, context, map_precision, mlp_precision)
    options = Options(activation, log_scale, constant, add_first, inverse, density)
    if keep:
        return small.forward_and_keep(s, options, x, matrix, offset, logabsdet, weights, biases, context)
    return *small.forward(s, options, x, matrix, offset, logabsdet, weights, biases, context), x.new_empty(0)


@torch.library.impl("glf_fast::cuda_coupling_flow_backward", ("cpu", "cuda"))
def _(
    grad_out: Tensor | None, grad_logdet: Tensor, out: Tensor, saved: Tensor, matrix: Tensor, offset: Tensor,
    weights: list[Tensor], biases: list[Tensor], context: Tensor | None, activation: str, log_scale: str,
    constant: float, add_first: bool, inverse: bool, density: bool, map_precision: int, mlp_precision: int,
    parameters: bool, of_context: bool,
) -> list[Tensor]:  # fmt: skip
    s = _shape_of(out, matrix, weights, context, map_precision, mlp_precision)
    options = Options(activation, log_scale, constant, add_first, inverse, density)
    grad_context = torch.empty_like(context) if of_context and context is not None else None
    kept = small.kept_parts(s, activation, len(out), saved)
    with torch.autocast(out.device.type, enabled=False):  # the precision of its products is decided here
        made = small.backward(s, options, kept, out, grad_out, grad_logdet, grad_context)
        found = [made.x, out.new_empty(0) if grad_context is None else grad_context]
        if not parameters:
            return found
        grad_matrix, grad_offset, grad_weights, grad_biases = small.parameter_gradients(s, kept, made)
        of_density = [grad_logdet.sum().expand(len(matrix)).contiguous()] if density else []
        return [*found, grad_matrix, grad_offset, *of_density, *grad_weights, *grad_biases]
