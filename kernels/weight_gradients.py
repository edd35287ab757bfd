"""Gradients of all parameters of a flow from the rows that its backward leaves in a workspace, portion by portion.

A weight's gradient is a product over rows, xᵀ g of x, what went into its layer, and g, the gradient of what came out. A bias's
is the sum of g's columns. On a GPU with the CUDA kernels all of them are one launch (csrc/cuda/row_products.cuh), else a
batched product for each weight and a launch for all sums (sums.py). Neither uses atomics: results repeat bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glf_fast.kernels.portions import multiprocessors, over_rows
from glf_fast.kernels.sums import column_sums

__all__ = ["InBatches", "InOneLaunch", "parts_of"]

OPERANDS = {"tf32x3": 0, "tf32": 1, "bf16": 2}  # as the operation glf_fast::row_products numbers them
SIDE = 64  # of a tile of results, a block's work there
PART = 512  # rows that a block adds up at least


class Results(NamedTuple):
    """Gradients of the maps (K, D, D), their offsets (K, D), log|det A| (K,) where there is a density, weights and biases."""

    matrix: Tensor
    offset: Tensor
    logabsdet: Tensor
    weights: list[Tensor]
    biases: list[Tensor]


class InBatches:
    """Batched matrix products, and a launch for all sums.

    `parameters`: the maps (K, D, D), then the weights (K, nᵢ, mᵢ). `constants`: the sizes of the flow's kernels, which say
    where a layer is in a row. `density`: whether there is a gradient of log|det A|. `rows`: of the largest portion.
    """

    def __init__(self, parameters: Sequence[Tensor], constants: dict[str, Any], density: bool, rows: int) -> None:
        self._parameters = parameters
        self._processors = multiprocessors(parameters[0].device)
        self._sums = column_sums(len(parameters[0]), rows, constants, density, parameters[0])
        self._products: list[Tensor] = []

    def add(
        self, pairs: Sequence[tuple[Tensor, Tensor]], slopes: Tensor, grad_logdet: Tensor, start: int, accumulate: bool
    ) -> None:
        """A portion's gradients: of steps `start` and following, or onto theirs.

        `pairs`: x and g (steps, rows, ·) of each product; all g but the maps' are columns of `slopes`. `grad_logdet` (rows,) is
        every step's.
        """
        self._sums.add(slopes, pairs[0][1], grad_logdet, start, accumulate)
        found = [over_rows(x, g, self._processors) for x, g in pairs]
        these = slice(start, start + len(slopes))
        if len(slopes) == len(self._parameters[0]) and not self._products:
            self._products = found
            return
        self._products = self._products or [torch.empty_like(t) for t in self._parameters]
        for total, product in zip(self._products, found, strict=True):
            if accumulate:
                total[these] += product
            else:
                total[these] = product

    def results(self) -> Results:
        """The sums and products of all portions."""
        *biases, offset, logabsdet = self._sums.totals()
        return Results(self._products[0], offset, logabsdet, self._products[1:], biases)


class InOneLaunch:
    """Products and sums of a portion in one launch, in float32. Arguments and methods as in `InBatches`.

    `precisions`: of the products of the maps, and of the weights.
    """

    def __init__(
        self, parameters: Sequence[Tensor], constants: dict[str, Any], density: bool, precisions: tuple[str, str]
    ) -> None:
        steps = len(parameters[0])
        like = parameters[0]
        self._products = [like.new_empty(t.shape) for t in parameters]
        self._sums = [like.new_empty(steps, t.shape[2]) for t in parameters]
        self._operands = [OPERANDS[precisions[i > 0]] for i in range(len(parameters))]
        if density:
            self._sums.append(like.new_empty(steps, 1))
            self._operands.append(OPERANDS["tf32x3"])
        self._processors = multiprocessors(like.device)

    def add(
        self, pairs: Sequence[tuple[Tensor, Tensor]], slopes: Tensor, grad_logdet: Tensor, start: int, accumulate: bool
    ) -> None:
        """As that of `InBatches`."""
        steps, rows, _ = slopes.shape
        these = slice(start, start + steps)
        x, g = map(list, zip(*pairs, strict=True))
        products = [t[these] for t in self._products]
        if len(self._sums) > len(pairs):  # log|det A| has a sum alone
            x.append(grad_logdet.new_empty(steps, rows, 0))
            g.append(grad_logdet[:, None].expand(steps, rows, 1))
            products.append(grad_logdet.new_empty(steps, 0, 1))
        parts = parts_of(rows, steps * sum(_tiles(t) for t in products), self._processors)
        torch.ops.glf_fast.row_products.default(
            x, g, self._operands, products, [t[these] for t in self._sums], accumulate, parts
        )

    def results(self) -> Results:
        """The sums and products of all portions."""
        matrix, *weights = self._products
        offset, *biases = self._sums[: len(self._products)]
        logabsdet = self._sums[-1][:, 0]  # without a density, nobody's
        return Results(matrix, offset, logabsdet, weights, biases)


def _tiles(product: Tensor) -> int:
    return max(1, -(-product.shape[1] // SIDE)) * -(-product.shape[2] // SIDE)


def parts_of(rows: int, tiles: int, processors: int) -> int:
    """Parts in which rows are added up, so that two blocks of a multiprocessor have work: one for the flows of few rows.

    A second launch adds the parts, some 2 µs in a graph: as long as a block takes for 512 rows (predicted, not measured).
    """
    return max(1, min(2 * processors // max(tiles, 1), rows // PART))
