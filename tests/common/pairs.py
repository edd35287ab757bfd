"""Cases of several options in which every two values of two options meet, where all combinations would prove the same."""

import itertools
from collections.abc import Sequence
from typing import Any

__all__ = ["pairs"]


def pairs(*options: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few cases, one value of each option, such that every pair of values of two options is in one of them.

    Always the same ones: from all combinations, again and again the first with the most pairs that are still missing.
    """
    combinations = list(itertools.product(*(range(len(values)) for values in options)))
    missing = {pair for case in combinations for pair in _of(case)}
    found = []
    while missing:
        case = max(combinations, key=lambda case: len(missing & _of(case)))
        missing -= _of(case)
        found.append(tuple(values[i] for values, i in zip(options, case, strict=True)))
    return found


def _of(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(case), 2))
