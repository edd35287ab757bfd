"""Scores of sampled sequences: the shares that are valid, different and new, and the mean of their objective."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from typing import Any

__all__ = ["score_texts"]


def score_texts(
    texts: Sequence[str],
    known: Collection[str],
    valid: Callable[[str], bool],
    value: Callable[[str], float | None] | None = None,
) -> dict[str, Any]:
    """Scores of n texts, JSON-ready.

    Args:
        known: the training set.    valid: whether a text is valid; if not, it has no value.
        value: the objective of a valid text, lower is better, or None for a text that turns out to be invalid.

    Returns:
        valid: share of valid texts among all.    unique: share of different texts among the valid ones.
        novel: share of the different valid texts that are not in the training set.    n: number of texts.
        mean, deviation: of the values of the valid texts, each as often as it was sampled; None without values.
        best: up to three different texts with the lowest values, as [value, text].
    """
    good = [text for text in texts if valid(text)]
    values: dict[str, float] = {}
    if value is not None:
        for text in dict.fromkeys(good):
            if (number := value(text)) is not None:
                values[text] = number
        good = [text for text in good if text in values]
    different = set(good)
    every = [values[text] for text in good] if values else []
    return {
        "n": len(texts),
        "valid": len(good) / len(texts) if texts else 0.0,
        "unique": len(different) / len(good) if good else 0.0,
        "novel": len(different.difference(known)) / len(different) if different else 0.0,
        "mean": statistics.fmean(every) if every else None,
        "deviation": statistics.stdev(every) if len(every) > 1 else None,
        "best": [[number, text] for number, text in sorted((number, text) for text, number in values.items())[:3]],
    }
