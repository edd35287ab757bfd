"""Small and medium coupling flows on a GPU: sizes, buffers and passes of the kernels in csrc/cuda.

Of a small flow a warp takes 16 rows through all steps (flow_kernels.cuh), of a medium one a cluster of blocks does
(cluster_kernels.cuh; `cluster` has their sizes). The kernels come from the compiled library, or from CuPy where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glf_fast.ops.backends import CUPY
from glf_fast.ops.coupling_flow import cluster
from glf_fast.ops.coupling_flow.cluster import DEPTHS
from glf_fast.reference import NEED_INPUT

__all__ = [
    "ACTIVATIONS",
    "BACK",
    "BF16",
    "FLOAT32",
    "FORTH",
    "LOG_SCALES",
    "MOST_LAYERS",
    "TF32",
    "FlowShape",
    "Gradients",
    "Kept",
    "Options",
    "backward",
    "density_gradient",
    "factors",
    "forward",
    "forward_and_keep",
    "kept_numbers",
    "kept_parts",
    "new_gradients",
    "pack",
    "parameter_gradients",
    "run",
    "unit_bytes",
]

# csrc/cuda/flow_call.cuh and row_tiles.cuh have these, too.
MOST_LAYERS, WARP_ROWS = 4, 16
FLOAT32, TF32, BF16 = range(3)  # precisions: float32 by three tf32 products, tf32, bfloat16
PLAIN, FORTH, BACK = (
    0,
    1,
    2,
)  # a forward without gradients; one that keeps what a backward needs, a backward, FORTH | BACK

# The kernels' numbers of the reference's names.
ACTIVATIONS = {
    name: i
    for i, name in enumerate(
        ("relu", "leaky_relu", "silu", "gelu", "tanh", "elu", "selu", "hardswish", "softplus", "mish")
    )
}
LOG_SCALES = {
    name: i
    for i, name in enumerate(
        ("tanh", "exp", "glow", "nflows", "atan", "softclip", "jet", "softplus", "clamp", "bayesflow")
    )
}


class FlowShape(NamedTuple):
    """Sizes of a flow, and the precisions of its products."""

    steps: int
    dim: int
    context: int
    hidden: tuple[int, ...]
    map: int
    mlp: int
    blocks: int = 1  # of a cluster that shares sixteen rows; 1: a warp has them for itself

    @property
    def half_tiles(self) -> int:
        """Tiles of 8 columns to which each half of a row is padded."""
        return -(-(self.dim - self.dim // 2) // 8)

    @property
    def hidden_tiles(self) -> int:
        """Tiles of 8 columns to which hidden layers are padded."""
        return 8 if self.blocks == 1 else cluster.hidden_tiles(self.blocks, max(self.hidden))

    @property
    def columns(self) -> list[int]:
        """Where each hidden layer begins in a row of the workspace, and then [p, context], or [∂u, ∂t]."""
        starts = [0]
        for width in self.hidden:
            starts.append(starts[-1] + _up(width))
        return starts

    @property
    def stride(self) -> int:
        """Numbers from one row of the workspace to the next, as in kernels/flow_options.py."""
        return self.columns[-1] + _up(max(2 * (self.dim // 2), self.dim - self.dim // 2 + self.context))

    def numbers(self) -> list[int]:
        """As the compiled library takes them."""
        return [
            self.steps,
            self.dim,
            self.context,
            self.half_tiles,
            self.hidden_tiles,
            self.map,
            self.mlp,
            self.blocks,
            *self.hidden,
        ]


class Options(NamedTuple):
    """Options of a call, by the reference's names."""

    activation: str
    log_scale: str
    constant: float
    add_first: bool
    inverse: bool
    density: bool


class Kept(NamedTuple):
    """Memory that a forward leaves to the backward: parts of one buffer, which the backward only reads."""

    transposed: Tensor  # packed parameters of the backward
    record: Tensor  # v, u and t of each step in the order of the warps' registers
    hidden: Tensor  # (K, B, stride), hidden layers and [p, context], in the type of the MLP's operands
    derivatives: Tensor | None  # (K, B, stride), a' of NEED_INPUT, which is no function of a
    map_in: Tensor  # (K, B, D), what the affine maps were applied to


class Gradients(NamedTuple):
    """Gradients that a backward makes of a flow's rows, and from which those of the parameters are made."""

    x: Tensor
    slopes: Tensor  # (K, B, stride), gradients of hidden layers before activation and [∂u, ∂t], in the type of `hidden`
    map_grad: Tensor  # (K, B, D), the gradient of what the affine maps returned


def _up(n: int) -> int:
    return -(-n // 16) * 16


def unit_bytes(s: FlowShape) -> tuple[int, int]:
    """Bytes of a packed step: the forward's, and the transposed one of the backward (`Layout`, csrc/cuda/flow_call.cuh)."""
    if s.blocks > 1:
        return cluster.step_bytes(s)

    def quads(precision: int, rows: int, tiles: int) -> int:
        return -(-rows // DEPTHS[precision]) * tiles * 32

    halves, hidden, inner = 2 * s.half_tiles, s.hidden_tiles, len(s.hidden) - 1
    square = inner * quads(s.mlp, 8 * hidden, hidden) + quads(s.map, 8 * halves, halves)
    forward = 4 * halves + 1 + square + quads(s.mlp, 8 * s.half_tiles, hidden) + quads(s.mlp, 8 * hidden, halves)
    forward += 2 * hidden * len(s.hidden) + quads(s.mlp, s.context, hidden)
    back = square + quads(s.mlp, 8 * halves, hidden) + quads(s.mlp, 8 * hidden, s.half_tiles)
    return 16 * forward, 16 * (back + quads(s.mlp, 8 * hidden, -(-s.context // 8)))


def kept_numbers(s: FlowShape, activation: str, rows: int) -> list[int]:
    """Numbers of 4 bytes of each part of `Kept`."""
    record = s.steps * -(-rows // WARP_ROWS) * 3 * s.half_tiles * 128
    layers = s.steps * rows * s.stride // (2 if s.mlp == BF16 else 1)
    return [
        s.steps * unit_bytes(s)[1] // 4, record, layers, layers if activation in NEED_INPUT else 0,
        s.steps * rows * s.dim,
    ]  # fmt: skip


def kept_parts(s: FlowShape, activation: str, rows: int, buffer: Tensor) -> Kept:
    """The parts of a buffer of sum(kept_numbers) numbers."""
    transposed, record, *layers, map_in = buffer.split(kept_numbers(s, activation, rows))
    dtype = torch.bfloat16 if s.mlp == BF16 else buffer.dtype
    hidden, derivatives = (part.view(dtype).view(s.steps, -1, s.stride) for part in layers)
    return Kept(
        transposed,
        record,
        hidden,
        derivatives if activation in NEED_INPUT else None,
        map_in.view(s.steps, rows, s.dim),
    )


def new_gradients(s: FlowShape, x: Tensor) -> Gradients:
    """Memory for the gradients of rows like x."""
    dtype = torch.bfloat16 if s.mlp == BF16 else x.dtype
    slopes = x.new_empty(s.steps, len(x), s.stride, dtype=dtype)
    return Gradients(torch.empty_like(x), slopes, x.new_empty(s.steps, len(x), s.dim))


# -- the two routes ----------------------------------------------------------------------------------------------------


def pack(
    s: FlowShape, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None, weights: Sequence[Tensor],
    biases: Sequence[Tensor], packed: Tensor, transposed: Tensor | None,
) -> None:  # fmt: skip
    """Put all parameters into the order in which warps read them: steps · unit_bytes, and the backward's if wanted."""
    parameters = matrix, offset, logabsdet, weights, biases
    if CUPY:
        from glf_fast.ops.coupling_flow import cupy

        cupy.pack(s, *parameters, packed, transposed)
    else:
        torch.ops.glf_fast.cuda_flow_pack.default(s.numbers(), *parameters, packed, transposed)


TENSORS = (
    "packed", "transposed", "x", "context", "out", "logdet", "map_in", "map_grad", "hidden", "derivatives", "slopes", "record",
    "grad_out",
"grad_logdet", "grad_x", "grad_context",
)  # fmt: skip


def run(s: FlowShape, options: Options, ways: int, like: Tensor, **tensors: Tensor | None) -> None:
    """One launch of the passes `ways` on as many rows as `like` has, from and to the tensors of these names of TENSORS."""
    if not len(like):
        return
    if CUPY:
        from glf_fast.ops.coupling_flow import cupy

        cupy.run(s, options, ways, s.stride, like, **tensors)
    else:
        given = [tensors.get(name) for name in TENSORS]
        numbers = (ACTIVATIONS[options.activation], LOG_SCALES[options.log_scale], *options[2:])
        torch.ops.glf_fast.cuda_flow_run.default(s.numbers(), *numbers, ways, s.stride, like, given)


# -- passes ------------------------------------------------------------------------------------------------------------


def forward(
    s: FlowShape, options: Options, x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None,
    weights: Sequence[Tensor], biases: Sequence[Tensor], context: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and logdet: two launches, of which the first packs the parameters."""
    out, logdet = torch.empty_like(x), x.new_empty(len(x))
    packed = x.new_empty(s.steps * unit_bytes(s)[0] // 4)
    pack(s, matrix, offset, logabsdet, weights, biases, packed, None)
    run(s, options, PLAIN, x, packed=packed, x=x, context=context, out=out, logdet=logdet)
    return out, logdet


def forward_and_keep(
    s: FlowShape, options: Options, x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None,
    weights: Sequence[Tensor], biases: Sequence[Tensor], context: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, logdet, and the buffer of `kept_parts`, from which `backward` starts."""
    out, logdet = torch.empty_like(x), x.new_empty(len(x))
    buffer = x.new_empty(sum(kept_numbers(s, options.activation, len(x))))
    kept = kept_parts(s, options.activation, len(x), buffer)
    packed = x.new_empty(s.steps * unit_bytes(s)[0] // 4)
    pack(s, matrix, offset, logabsdet, weights, biases, packed, kept.transposed)
    run(s, options, FORTH, x, packed=packed, x=x, context=context, out=out, logdet=logdet, **kept._asdict())
    return out, logdet, buffer


def backward(
    s: FlowShape, options: Options, kept: Kept, out: Tensor, grad_out: Tensor | None, grad_logdet: Tensor,
    grad_context: Tensor | None,
) -> Gradients:  # fmt: skip
    """The gradients, and ∂context in `grad_context`. Without `grad_out`, of a density, from its output."""
    made = new_gradients(s, out)
    run(
        s, options, BACK, out, out=out, grad_out=grad_out, grad_logdet=grad_logdet, grad_x=made.x, slopes=made.slopes,
        map_grad=made.map_grad, grad_context=grad_context, **kept._asdict(),
    )  # fmt: skip
    return made


def density_gradient(
    s: FlowShape, options: Options, x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor | None,
    weights: Sequence[Tensor], biases: Sequence[Tensor], context: Tensor | None, grad_logdet: Tensor | None,
    grad_context: Tensor | None = None,
) -> tuple[Tensor, Tensor, Kept, Gradients]:  # fmt: skip
    """Output, density and gradients, given ∂density (B,), or 1 for every row: both ways in one launch.

    For a training step whose ∂density is known beforehand, −1/B for every row: rows never meet, so that each warp turns back
    when it has arrived.
    """
    out, logdet, made = torch.empty_like(x), x.new_empty(len(x)), new_gradients(s, x)
    buffer = x.new_empty(sum(kept_numbers(s, "relu", len(x))))  # derivatives lie where their gradients will
    kept = kept_parts(s, "relu", len(x), buffer)._replace(derivatives=made.slopes)
    packed = x.new_empty(s.steps * unit_bytes(s)[0] // 4)
    pack(s, matrix, offset, logabsdet, weights, biases, packed, kept.transposed)
    run(
        s, options, FORTH | BACK, x, packed=packed, x=x, context=context, out=out, logdet=logdet,
        grad_logdet=grad_logdet, grad_x=made.x, slopes=made.slopes, map_grad=made.map_grad, grad_context=grad_context,
        **kept._asdict(),
    )  # fmt: skip
    return out, logdet, kept, made


def factors(s: FlowShape, kept: Kept, made: Gradients) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of each layer of the networks (K, B, n_in), and gradients of its outputs (K, B, n_out)."""
    passive, at = s.dim - s.dim // 2, s.columns
    ends = [*(a + n for a, n in zip(at, s.hidden, strict=False)), at[-1] + 2 * (s.dim // 2)]
    inputs = [kept.hidden[..., at[-1] : at[-1] + passive + s.context]]
    inputs += [kept.hidden[..., a:b] for a, b in zip(at, ends[:-1], strict=False)]
    return inputs, [made.slopes[..., a:b] for a, b in zip(at, ends, strict=True)]


def parameter_gradients(s: FlowShape, kept: Kept, made: Gradients) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """∂matrix, ∂offset, ∂weights and ∂biases: a batched product for each matrix, and a sum for each vector."""
    inputs, slopes = factors(s, kept, made)
    weights = [_product(a, b) for a, b in zip(inputs, slopes, strict=True)]
    biases = [b.sum(1, dtype=made.x.dtype) for b in slopes]
    return _product(kept.map_in, made.map_grad), made.map_grad.sum(1), weights, biases


def _product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of each step, in float32: (K, n, m) of (K, B, n) and (K, B, m)."""
    if a.dtype != torch.bfloat16:
        return torch.bmm(a.mT, b)
    return torch.bmm(a.mT, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.mT.float(), b.float())
