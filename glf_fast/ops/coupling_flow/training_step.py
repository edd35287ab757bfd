"""A whole training step of a small coupling flow on a GPU in five launches, by AdamW: batch, passes, sums, gradients, update.

The passes are those of `small.density_gradient`, the sums over rows those of `glf_fast::row_products`; batch, gradients and
update are the kernels of csrc/cuda/flow_update.cuh. Nothing waits for the host, and nothing is allocated that a graph could
not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glf_fast.ops import row_products
from glf_fast.ops.backends import CUPY, kernels_for
from glf_fast.ops.coupling_flow import cuda, small
from glf_fast.ops.coupling_flow.call import Call, CallOptions
from glf_fast.ops.coupling_flow.small import FlowShape, Options
from glf_fast.reference import Plu, constant_of_activation, prepared_constant

__all__ = ["AdamW", "Progress", "Rows", "SmallFlowStep", "Trained", "Update", "small_flow_step"]

PART = 512  # rows that a block of the sums adds up at least, as in kernels/weight_gradients.py
SQUARES_CHUNK, FACTORS = 4096, 4  # csrc/cuda/flow_trained.cuh has these, too
STRIP_ROWS, TILE_COLUMNS, SUM_ROWS = 16, 32, 4  # csrc/cuda/plu.cuh has these


class Trained(NamedTuple):
    """A parameter of all steps, and the state that torch.optim.AdamW has for it."""

    value: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor  # (), float32: how many were made


class AdamW(NamedTuple):
    """Settings of the optimizer; `clip`: longest gradient, over all parameters, infinity for any."""

    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    clip: float


class Rows(NamedTuple):
    """All rows: x (N, D), context (N, C), factors of losses (N,); float32, contiguous."""

    x: Tensor
    context: Tensor | None
    weights: Tensor | None


class Progress(NamedTuple):
    """Which rows each step takes (steps, B), learning rates (steps,), losses before each step (steps,), and steps made (1,).

    Without `made` each step is the first one.
    """

    order: Tensor
    rates: Tensor
    losses: Tensor
    made: Tensor | None


class Update(NamedTuple):
    """Arguments of the gradients and the update, beside sizes: see `glf_fast::cuda_flow_update`."""

    permutation: Tensor
    sign: Tensor
    parameters: list[Trained]  # lower, upper, log_diag, then those of an ActNorm if there is one, weights, biases
    gradients: Tensor  # of all parameters, one behind the other
    maps: list[Tensor]  # A, c, log|det A|
    map_gradients: list[Tensor]
    log_prob: Tensor
    slopes: Tensor  # ∂loss/∂log p
    scratch: Tensor
    progress: Progress
    by: AdamW
    packed: Tensor | None  # for the next step; None: they are not packed, nor are the maps assembled
    transposed: Tensor | None


def small_flow_step(
    plu: Plu, weights: Sequence[Tensor], biases: Sequence[Tensor], options: Mapping[str, Any], trained: Sequence[Trained],
    rows: Rows, progress: Progress, by: AdamW,
) -> SmallFlowStep | None:  # fmt: skip
    """The training steps of a flow by these kernels, or None where they are not chosen for it here and now.

    Args:
        options: as `plu_flow_log_prob` takes them.
    """
    x, context, _ = rows
    if options["coupling"] != "affine" or any(t is not None and t.dtype != torch.float32 for t in (*trained[0], *rows)):
        return None
    batch = progress.order.shape[1]
    constant = prepared_constant(options["log_scale"], options["log_scale_constant"])
    activation_constant = constant_of_activation(options["activation"], options["activation_constant"])
    called = CallOptions(
        "affine", options["network"], options["activation"], activation_constant, options["log_scale"],
        options["log_scale_constant"], options["add_first"], None, False, options["reversible"], True, True, constant,
    )  # fmt: skip
    contexts = None if context is None else context.new_empty(batch, context.shape[1])
    call = Call(x.new_empty(batch, x.shape[1]), contexts, plu, weights, biases, called)
    if kernels_for(call.x, call, cuda) is None or not row_products.ready(call.x) or not _built():
        return None
    shape = cuda.shape_of(call)
    if shape.blocks > 1:  # a medium flow, whose weights this update does not pack
        return None
    passes = Options(options["activation"], options["log_scale"], constant, options["add_first"], False, True)
    return SmallFlowStep(shape, passes, plu, trained, rows, progress, by)


def _built() -> bool:
    """Whether the kernels are there: the compiled library may be an older one."""
    return CUPY or torch._C._dispatch_has_kernel_for_dispatch_key("glf_fast::cuda_flow_update", "CUDA")


class SmallFlowStep:
    """The memory of a training step, and its launches. Parameters and the optimizer's state are changed in place.

    Args:
        plu: PLU factors of all steps; those that are trained are in `trained`, too.
        trained: every parameter but permutation and sign, in the order of `Update.parameters`.
    """

    def __init__(
        self, s: FlowShape, options: Options, plu: Plu, trained: Sequence[Trained], rows: Rows, progress: Progress, by: AdamW
    ) -> None:  # fmt: skip
        self._shape, self._options, self._plu, self._rows = s, options, plu, rows
        like, batch, layers = plu.lower, progress.order.shape[1], len(s.hidden) + 1
        values = [t.value for t in trained]
        self._weights, self._biases = values[-2 * layers : -layers], values[-layers:]
        gradients = like.new_empty(sum(v.numel() for v in values))
        self.gradients = [
            g.view_as(v) for g, v in zip(gradients.split([v.numel() for v in values]), values, strict=True)
        ]

        vector, number = like.new_empty(s.steps, s.dim), like.new_empty(s.steps)
        maps, map_gradients = ([torch.empty_like(t) for t in (like, vector, number)] for _ in range(2))
        self._x = like.new_empty(batch, s.dim)
        self._context = like.new_empty(batch, s.context) if s.context else None
        self._out, log_prob, slopes = torch.empty_like(self._x), like.new_empty(batch), like.new_empty(batch)
        self._made = small.new_gradients(s, self._x)
        buffer = like.new_empty(sum(small.kept_numbers(s, "relu", batch)))  # derivatives lie where their gradients will
        self._kept = small.kept_parts(s, "relu", batch, buffer)._replace(derivatives=self._made.slopes)
        self._packed = like.new_empty(s.steps * small.unit_bytes(s)[0] // 4)

        jobs = 2 * -(-s.dim // STRIP_ROWS) * -(-s.dim // TILE_COLUMNS)
        jobs += 0 if plu.log_scale is None else -(-s.dim // SUM_ROWS)
        networks = sum(v.numel() for v in (*self._weights, *self._biases))
        scratch = like.new_empty(FACTORS + s.steps * jobs + -(-networks // SQUARES_CHUNK) + 1)
        self._update = Update(
            plu.permutation, plu.sign, [*trained], gradients, maps, map_gradients, log_prob, slopes, scratch, progress, by,
            *([None] * 2 if progress.made is None else [self._packed, self._kept.transposed]),
        )  # fmt: skip
        self._products = self._arguments_of_products()
        self._parts = _parts(self._products[3], batch)

    def _arguments_of_products(self) -> tuple[list[Tensor], list[Tensor], list[int], list[Tensor], list[Tensor]]:
        """The lists that `glf_fast::row_products` takes: of the maps, each layer, and log|det A|, which has a sum alone."""
        s, u = self._shape, self._update
        inputs, slopes = small.factors(s, self._kept, self._made)
        layers = len(s.hidden) + 1
        x = [self._kept.map_in, *inputs, self._x.new_empty(s.steps, len(self._x), 0)]
        g = [self._made.map_grad, *slopes, u.slopes[:, None].expand(s.steps, -1, 1)]
        matrix, offset, logabsdet = u.map_gradients
        weights, biases = self.gradients[-2 * layers : -layers], self.gradients[-layers:]
        operands = [s.map, *[s.mlp] * layers, small.FLOAT32]
        return (
            x,
            g,
            operands,
            [matrix, *weights, matrix.new_empty(s.steps, 0, 1)],
            [offset, *biases, logabsdet[:, None]],
        )

    @torch.no_grad()
    def prepare(self) -> None:
        """Assemble the maps and pack all parameters: before the first of several steps, and before each single one."""
        plu = [None if t is None else t.detach() for t in self._plu]
        matrix, _, offset, logabsdet = torch.ops.glf_fast.plu_assemble.default(*plu, False)
        u = self._update
        if u.packed is None:
            self._update = u = u._replace(maps=[matrix, offset, logabsdet])
        else:  # a graph has their addresses
            for to, found in zip(u.maps, (matrix, offset, logabsdet), strict=True):
                to.copy_(found)
        weights, biases = ([t.detach() for t in layers] for layers in (self._weights, self._biases))
        matrix, offset, logabsdet = u.maps
        small.pack(self._shape, matrix, offset, logabsdet, weights, biases, self._packed, self._kept.transposed)

    @torch.no_grad()
    def run(self) -> None:
        """Make a step."""
        u, p = self._update, self._update.progress
        _batch(p.order, p.made, self._rows, self._x, self._context, u.slopes)
        made, both_ways = self._made, small.FORTH | small.BACK
        small.run(
            self._shape, self._options, both_ways, self._x, packed=self._packed, x=self._x, context=self._context,
            out=self._out, logdet=u.log_prob, grad_logdet=u.slopes, grad_x=made.x, slopes=made.slopes, map_grad=made.map_grad,
            **self._kept._asdict(),
        )  # fmt: skip
        torch.ops.glf_fast.row_products.default(*self._products, False, self._parts)
        _update(self._shape, u)


def _parts(products: list[Tensor], rows: int) -> int:
    """Parts in which the rows are added up, as `parts_of` of kernels/weight_gradients.py."""
    side = 64  # of a block's tile
    tiles = len(products[0]) * sum(max(1, -(-p.shape[1] // side)) * -(-p.shape[2] // side) for p in products)
    device = products[0].device
    on_gpu = device.type == "cuda"  # tests run the kernels on a processor
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    return max(1, min(2 * processors // tiles, rows // PART))


def _batch(order: Tensor, made: Tensor | None, rows: Rows, x: Tensor, context: Tensor | None, slopes: Tensor) -> None:
    """Gather the next batch: rows, contexts and ∂loss/∂log p = −weight/B of each. A row that does not exist is NaN."""
    if CUPY:
        from glf_fast.ops.coupling_flow import cupy

        cupy.batch(order, made, rows, x, context, slopes)
    else:
        torch.ops.glf_fast.cuda_flow_batch.default(order, made, *rows, x, context, slopes)


def _update(s: FlowShape, u: Update) -> None:
    """Two launches: gradients of the PLU layers and the norm of all gradients; AdamW, the next maps and packed parameters."""
    if CUPY:
        from glf_fast.ops.coupling_flow import cupy

        cupy.update(s, u)
        return
    values, means, squares, counts = ([*part] for part in zip(*u.parameters, strict=True))
    torch.ops.glf_fast.cuda_flow_update.default(
        s.numbers(), u.permutation, u.sign, [v.detach() for v in values], means, squares, counts, u.gradients, u.maps,
        u.map_gradients, u.log_prob, u.slopes, u.scratch, u.progress.rates, u.progress.losses, u.progress.made,
        *u.by.betas, u.by.epsilon, u.by.weight_decay, u.by.clip, u.packed, u.transposed,
    )  # fmt: skip
