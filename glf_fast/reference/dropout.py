"""Dropout by a counter-based generator: the same seed drops the same units, wherever and however often they are computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Dropout", "philox"]

WORD = 0xFFFFFFFF
MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


class Dropout(NamedTuple):
    """Dropout in the networks of one step: h ← h·m/(1 − p), with m = 1 for a share 1 − p of all hidden units, else 0.

    The number that decides about a unit is word unit % 4 of Philox4x32-10 at the counter (unit // 4, row, layer + 2¹⁶·network,
    step), with the seed as its key. A unit is kept where this number is at least p·2³², rounded.
    """

    probability: float  # p, at least 0 and below 1
    seed: Tensor  # int64, one element
    step: int
    network: int = 0  # of the step's networks

    def __call__(self, h: Tensor, layer: int) -> Tensor:
        """h (B, H) of a hidden layer, by its number, with dropped units."""
        rows, units = h.shape
        row = torch.arange(rows, device=h.device)[:, None]
        column = torch.arange(-(-units // 4), device=h.device)
        counter = [column, row, torch.full_like(row, layer + (self.network << 16)), torch.full_like(row, self.step)]
        numbers = torch.stack(philox(self.seed.to(h.device).reshape(()), counter), -1).flatten(1)[:, :units]
        kept = numbers >= min(round(self.probability * 2**32), WORD)
        return h * (kept.to(h.dtype) / (1 - self.probability))


def philox(key: Tensor, counter: list[Tensor]) -> list[Tensor]:
    """The four words of Philox4x32-10 for each counter: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    `key` () of 64 bits, `counter` four tensors of words, from the lowest on, that broadcast together. All are int64, in which
    words are from 0 to 2³² − 1.
    """
    x0, x1, x2, x3 = torch.broadcast_tensors(*counter)
    k0, k1 = key & WORD, key >> 32 & WORD
    for _ in range(10):
        a, b = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]  # of 64 bits, of which the highest is a sign here
        x0, x1, x2, x3 = (b >> 32 & WORD) ^ x1 ^ k0, b & WORD, (a >> 32 & WORD) ^ x3 ^ k1, a & WORD
        k0, k1 = k0 + WEYL[0] & WORD, k1 + WEYL[1] & WORD
    return [x0, x1, x2, x3]
