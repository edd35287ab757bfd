"""Second derivatives: kernels give the first ones, plain PyTorch those of the same function again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.options import Options

__all__ = ["differentiate", "differentiate_flow"]


def differentiate(
    run: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: those of `run`, the same function in plain PyTorch."""
    # Through aliases: where one input was computed from another, its gradient must not run into the other's.
    aliases = [None if x is None else x.view_as(x) for x in inputs]
    targets = [x for x, want in zip(aliases, wanted, strict=True) if want and x is not None]
    found = iter(torch.autograd.grad(run(*aliases), targets, grads, create_graph=True))
    return [next(found) if want and x is not None else None for x, want in zip(aliases, wanted, strict=True)]


def differentiate_flow(
    options: Options, inputs: Sequence[Tensor | None], wanted: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The same of a whole flow, whose inputs are x, matrix, offset, context, weights … and biases …"""
    op = reference.coupling_flow_inverse if options.inverse else reference.coupling_flow

    def run(x: Tensor, matrix: Tensor, offset: Tensor, context: Tensor | None, *layers: Tensor) -> tuple[Tensor, ...]:
        weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        return op(x, matrix, offset, weights, biases, context, **options.named())

    return differentiate(run, inputs, wanted, grads)
