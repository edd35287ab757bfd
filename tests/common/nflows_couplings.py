"""Couplings of nflows with MLPs that take a context, as people write them: nflows' own MLP takes none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from nflows.transforms import AffineCouplingTransform
from torch import Tensor, nn


class Net(nn.Module):
    """An MLP on [x, context], or on x alone, whatever it is given, if it `ignores` the context."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        hidden: Sequence[int] = (8,),
        activation: nn.Module | None = None,
        dropout: float = 0.0,
        ignores: bool = False,
    ) -> None:
        super().__init__()
        widths = [n_in, *hidden]
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation or nn.Tanh())]
        self.body = nn.Sequential(*layers, *[nn.Dropout(dropout)] * bool(dropout))
        self.head = nn.Linear(widths[-1], n_out)
        self.ignores = ignores

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.head(self.body(x if context is None or self.ignores else torch.cat([x, context], dim=1)))


def alternating(dim: int, n: int = 2, make: Callable[[int, int], nn.Module] = Net) -> Iterator[nn.Module]:
    """Couplings that transform every other column in turn."""
    for k in range(n):
        yield AffineCouplingTransform(torch.tensor([(-1) ** (i + k) for i in range(dim)]), make)
