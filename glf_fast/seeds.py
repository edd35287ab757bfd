"""Random numbers keyed by their purpose, so that no draw depends on the draws before it."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator"]


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` whose stream depends on `key` alone, for instance generator(seed, "noise", rank, images seen).

    Different keys give unrelated streams.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
