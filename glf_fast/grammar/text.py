"""Sequences of tokens in writing, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["read", "write"]


def write(tokens: Tensor, vocabulary: Sequence[str], padding: int) -> list[str]:
    """Sequences of indices (n, L) into a vocabulary as text: each one's tokens up to the first padding, joined."""
    texts = []
    for row in tokens.tolist():
        end = row.index(padding) if padding in row else len(row)
        texts.append("".join(vocabulary[i] for i in row[:end]))
    return texts


def read(texts: Sequence[str], length: int, vocabulary: Sequence[str], padding: int) -> Tensor:
    """Texts as sequences int64 (n, length) of indices of their characters, which are all in the vocabulary."""
    index = {token: i for i, token in enumerate(vocabulary)}
    rows = [[*(index[c] for c in text), *[padding] * (length - len(text))] for text in texts]
    return torch.tensor(rows, dtype=torch.int64).view(len(texts), length)
