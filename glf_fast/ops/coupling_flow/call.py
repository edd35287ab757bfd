"""The arguments of one coupling flow, or several of one shape, as one value: input, maps and networks of all steps, options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glf_fast.ops.affine_coupling.call import AffineOptions
from glf_fast.reference import Spline

__all__ = ["Call", "CallOptions", "Maps"]


class CallOptions(NamedTuple):
    """The options of a flow, by the names that `glf_fast.reference` uses."""

    coupling: str
    network: str
    activation: str
    activation_constant: float  # 0 where it has none
    log_scale: str
    log_scale_constant: float | None
    add_first: bool
    spline: Spline | None  # of a coupling "spline" alone
    inverse: bool
    reversible: bool  # the backward rebuilds the steps' inputs from the output
    density: bool  # log N(out; 0, I) and the maps' log-determinants are added to the steps'
    plu: bool  # the maps are given by the factors of PLU layers
    constant: float  # the log-scale's, as kernels take it
    autocast: str = ""  # of the networks' products: "bf16" or "fp16" under torch.autocast
    members: int = 1  # flows in this call; the rows, and the steps, of each of them follow those of the one before
    row_scales: bool = False  # of the matrices only the scales of their rows are trained
    dropout: float = 0.0  # probability with which hidden units are dropped

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the reference's flows, whose direction is in their name."""
        return dict(zip(self._fields[:8], self, strict=False)) | {"dropout": self.dropout}

    def affine(self) -> AffineOptions:
        """The options of a step's elementwise coupling."""
        return AffineOptions(self.log_scale, self.log_scale_constant, self.add_first, self.inverse)


class Maps(NamedTuple):
    """The affine maps x A + c of all steps."""

    matrix: Tensor  # A, or for the inverse A⁻¹ (K, D, D)
    offset: Tensor  # c (K, D)
    logabsdet: Tensor | None  # for a density: Σ log|det A| (), or log|det A| (K,)


class Call(NamedTuple):
    """One call of a coupling flow."""

    x: Tensor  # data, or for the inverse noise (B, D)
    context: Tensor | None  # (B, C)
    maps: Any  # Maps, or the factors, Plu, where options.plu says so
    weights: Sequence[Tensor]  # by linear layer of the networks: (K, nᵢ, nᵢ₊₁), or (K, 2, nᵢ, nᵢ₊₁) for "separate"
    biases: Sequence[Tensor]  # (K, nᵢ₊₁), or (K, 2, nᵢ₊₁)
    options: CallOptions
    seed: Tensor | None = None  # int64, one element: of what is dropped

    def by_members(self, run: Callable[[Call], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Results of `run` for every member's own call, one after the other. Member e has the seed plus e."""
        x, context, maps, weights, biases, options, seed = self
        n, one = options.members, options._replace(members=1)
        rows = (n, len(x) // n)

        def of_each(tensor: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * n if tensor is None else tensor.chunk(n)

        calls = zip(
            x.unflatten(0, rows),
            [None] * n if context is None else context.unflatten(0, rows),
            map(Maps, *map(of_each, maps)),
            zip(*map(of_each, weights), strict=True),
            zip(*map(of_each, biases), strict=True),
            [one] * n,
            [None if seed is None else seed + e for e in range(n)],
            strict=True,
        )
        return tuple(map(torch.cat, zip(*(run(Call(*call)) for call in calls), strict=True)))
