"""All sentences of a grammar up to a depth, in a fixed order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from glf_fast.grammar.grammar import Grammar

__all__ = ["sentences"]

Sentence = tuple[tuple[str, ...], tuple[int, ...]]


def sentences(grammar: Grammar, depth: int) -> Iterator[Sentence]:
    """Terminals and leftmost derivation of every sentence whose tree has at most `depth` levels, leaves included.

    The order is depth first, rules in the order of the grammar, as in `nltk.parse.generate`.
    """
    shorter: dict[tuple[str, int], list[Sentence]] = {}

    def all_from(name: str, depth: int) -> list[Sentence]:
        if (name, depth) not in shorter:
            shorter[name, depth] = list(each_from(name, depth))
        return shorter[name, depth]

    def each_from(name: str, depth: int) -> Iterator[Sentence]:
        if depth < 2:  # a rule and its leaves are two levels
            return
        for number, rule in enumerate(grammar.rules):
            if rule.left != name:
                continue
            options = [[((s,), ())] if terminal else all_from(s, depth - 1) for s, terminal in rule.right]
            for parts in itertools.product(*options):
                yield sum((part[0] for part in parts), ()), sum((part[1] for part in parts), (number,))

    return each_from(grammar.nonterminals[0], depth)
