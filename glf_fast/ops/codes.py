"""The numbers by which the processor's kernels know the reference's names, as the compiled library says them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from glf_fast.ops.backends import CPP
from glf_fast.reference import ACTIVATIONS, COUPLINGS, LOG_SCALES, MASKED_NETWORKS, NETWORKS

__all__ = ["ACTIVATION_CODES", "COUPLING_CODES", "LOG_SCALE_CODES", "NETWORK_CODES"]


def _codes(table: str, names: Iterable[str]) -> dict[str, int]:
    """Name → number, of those that csrc has."""
    if CPP.missing:
        return {}
    numbers = {name: torch.ops.glf_fast.cpu_code(table, name) for name in names}
    return {name: number for name, number in numbers.items() if number >= 0}


ACTIVATION_CODES = _codes("activation", ACTIVATIONS)
COUPLING_CODES = _codes("coupling", COUPLINGS)
LOG_SCALE_CODES = _codes("log_scale", LOG_SCALES)
NETWORK_CODES = _codes("network", (*NETWORKS, *MASKED_NETWORKS))
