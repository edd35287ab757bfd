"""Stored parameters as a flow uses them: with some entries frozen, or times a fixed factor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FixedFactor", "FrozenEntries"]


class FrozenEntries(nn.Module):
    """Mask of the entries of a parameter that are trained, and the values of the others.

    Args:
        name: the parameter's, for errors.
        parameter: with the values at which entries are frozen.
        trained: bool, of the parameter's shape; False where an entry is frozen. The buffer of this name holds 1 and 0, because
            tools that average buffers cannot subtract bools.
    """

    value: Tensor
    trained: Tensor

    def __init__(self, name: str, parameter: Tensor, trained: Tensor) -> None:
        super().__init__()
        if trained.shape != parameter.shape or trained.dtype != torch.bool:
            raise ValueError(
                f"trained must be a bool tensor of {name}'s shape {tuple(parameter.shape)}; "
                f"got {trained.dtype} {tuple(trained.shape)}"
            )
        self.register_buffer("value", parameter.detach().clone())
        self.register_buffer("trained", trained.to(parameter.detach()))

    def forward(self, parameter: Tensor) -> Tensor:
        """The parameter with its frozen entries at their values; they get no gradient."""
        return torch.lerp(self.value, parameter, self.trained)  # exactly one of the two where the weight is 0 or 1


class FixedFactor(nn.Module):
    """A factor of a parameter that no optimizer sees.

    Args:
        factor: not trained; it broadcasts to the parameter's shape.
    """

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.detach().clone())

    def forward(self, parameter: Tensor) -> Tensor:
        """The parameter times the factor."""
        return parameter * self.factor
