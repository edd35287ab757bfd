"""Batch norm in eval mode within a network, folded into the linear layer before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from glf_fast.conversion.layers import Unfusable, trained_together

__all__ = ["Norm", "batch_norm_step", "check_once", "without_norms"]


@dataclass(frozen=True)
class Norm:
    """A step of a network: batch norm in eval mode, x·gain + shift of its units, with the `parameters` that it has."""

    gain: Tensor
    shift: Tensor
    parameters: tuple[Tensor, ...]


def batch_norm_step(module: nn.BatchNorm1d) -> Norm:
    """The step of a batch norm in eval mode; raises Unfusable where it takes the statistics of each batch."""
    if module.training or module.running_mean is None or module.running_var is None:
        raise Unfusable("batch norm takes the statistics of each batch; in eval mode, with running ones, it is fused")
    gain = (module.running_var + module.eps).rsqrt()
    if not module.affine:
        return Norm(gain, -module.running_mean * gain, ())
    gain = module.weight * gain
    return Norm(gain, module.bias - module.running_mean * gain, (module.weight, module.bias))


def without_norms(name: str, steps: Sequence[Any]) -> list[Any]:
    """The steps with batch norms as factors and shifts of the linear layers before them; raises Unfusable."""
    if not any(isinstance(step, Norm) for step in steps):
        return list(steps)
    check_once(
        name, [step if isinstance(step, tuple) else step.parameters for step in steps if isinstance(step, tuple | Norm)]
    )
    folded: list[Any] = []
    for step in steps:
        if not isinstance(step, Norm):
            folded.append(step)
            continue
        linear = folded[-1] if folded else None  # dropout before the norm would not drop the same behind it
        if not isinstance(linear, tuple):
            raise Unfusable(f"{name} has batch norm that follows no linear layer")
        W, b = linear
        trained_together(*(p for p in (W, b, *step.parameters) if p is not None))
        folded[-1] = (W * step.gain.unsqueeze(-1), step.shift if b is None else b * step.gain + step.shift)
    return folded


def check_once(name: str, layers: Iterable[Iterable[Tensor | None]]) -> None:
    """Raise Unfusable where two layers have a parameter in common."""
    parameters = [id(t) for layer in layers for t in layer if t is not None]
    if len(set(parameters)) < len(parameters):
        raise Unfusable(f"{name} uses a linear layer more than once: its copies would not stay equal in training")
