"""Degrees from masks: how the features and the hidden units of a masked network are sorted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glf_fast.conversion.layers import Unfusable

__all__ = ["degrees"]

# (source, target, mask): unit j of the target layer is given unit i of the source where mask[j, i].
Edge = tuple[int, int, Tensor]


def degrees(masks: Sequence[Tensor], blocks: int = 0) -> list[Tensor]:
    """The degrees of the features and of each hidden layer's units, unsorted; see `glf_fast.reference.made`.

    A feature's degree is larger than those of all hidden units that it sees, and a unit's at least as large as those of the
    features and units that it sees. If there are such degrees for which, the other way round, everything of a degree that may
    be seen is seen, these are found; else the least that the masks allow.

    Args:
        masks: bool, (H₁, D), (H₂, H₁), …, (D, H): of the linear layers in the order of `made`, the last one by feature.
        blocks: of a residual network; the units of its stream have one degree each in all blocks.

    Raises:
        Unfusable: a feature depends on itself.
    """
    hidden = [len(mask) for mask in masks[:-1]]
    layers = [0, *range(1, len(masks))]  # which degrees each layer of the result has
    if blocks:
        layers = [0, 1, *(place for k in range(blocks) for place in (2 + k, 1))]
        hidden = [hidden[0], *hidden[1::2]]
    edges = [(layers[i], layers[i + 1], mask) for i, mask in enumerate(masks[:-1])]
    last = layers[len(masks) - 1], masks[-1]
    found = _counted(edges, last, hidden)
    if found is None:
        found = _least(edges, last, hidden, tight=True)
    if found is None:
        found = _least(edges, last, hidden, tight=False)
    if found is None:
        raise Unfusable("its masks leave no order of the features: one of them depends on itself")
    return [found[layer] for layer in layers]


def _counted(edges: Sequence[Edge], last: tuple[int, Tensor], hidden: Sequence[int]) -> list[Tensor] | None:
    """Degrees by which units see all that they may, in one pass, as nearly all masks have them; None if not these.

    A feature's degree is one more than the number of features that it depends on, a unit's the largest that it sees.
    `_least` takes up to D passes: seconds for 256 features and 512 units.
    """
    source, outputs = last
    dim = len(outputs)
    reach = [outputs.new_zeros(n, dim, dtype=torch.float) for n in (dim, *hidden)]  # the features that each unit sees
    reach[0].fill_diagonal_(1)
    for i, j, mask in edges:
        reach[j] = torch.maximum(reach[j], (mask.float() @ reach[i]).clamp(max=1))
    features = 1 + (outputs.float() @ reach[source]).count_nonzero(1)
    found = [features, *((features * units).amax(1).long() for units in reach[1:])]
    exact = all(torch.equal(mask, found[j][:, None] >= found[i]) for i, j, mask in edges)
    return found if exact and torch.equal(outputs, features[:, None] > found[source]) else None


def _least(
    edges: Sequence[Edge], last: tuple[int, Tensor], hidden: Sequence[int], *, tight: bool
) -> list[Tensor] | None:
    """The least degrees; with `tight` those for which units see all that they may. None if there are none up to D."""
    source, outputs = last
    dim = len(outputs)
    found = [torch.ones(dim, dtype=torch.long), *(torch.zeros(width, dtype=torch.long) for width in hidden)]

    def raise_to(layer: int, least: Tensor, mask: Tensor, step: int) -> None:
        """The degrees of a layer, where mask (units, others), to those of the others (others,) plus the step."""
        if mask.numel():
            found[layer] = torch.maximum(found[layer], torch.where(mask, least + step, 0).amax(1))

    while True:
        before = [layer.clone() for layer in found]
        for i, j, mask in edges:
            raise_to(j, found[i], mask, 0)
            if tight:
                raise_to(i, found[j], ~mask.T, 1)
        raise_to(0, found[source], outputs, 1)
        if tight:
            raise_to(source, found[0], ~outputs.T, 0)
        if max(int(layer.max()) for layer in found) > dim:
            return None
        if all(map(torch.equal, before, found)):
            return found
