"""Arithmetic expressions: 100,000 sentences of a grammar, which are generated and not fetched."""

from __future__ import annotations

import itertools
from functools import cache

from glf_fast.data.dataset import TokenDataset
from glf_fast.data.source import Files, Source
from glf_fast.data.strings import token_dataset
from glf_fast.grammar import EXPRESSIONS as GRAMMAR
from glf_fast.grammar import Grammar, sentences

__all__ = ["EXPRESSIONS", "all_expressions"]

COUNT, DEPTH = 100_000, 6
POLICY = "the first 100,000 expressions of depth 6; test: a tenth of a fixed random order"


@cache
def all_expressions() -> tuple[str, ...]:
    """The expressions in the order of their enumeration, as in the data of arXiv:1703.01925 but without blanks."""
    found = itertools.islice(sentences(Grammar.of(GRAMMAR), DEPTH), COUNT)
    return tuple("".join(terminals) for terminals, _ in found)


def read_expressions(files: Files, split: str, image_size: int | None) -> TokenDataset:
    """Characters, int64 (90000 or 10000, 19)."""
    return token_dataset("expressions", split, all_expressions(), GRAMMAR, "expression", POLICY)


EXPRESSIONS = Source(
    name="expressions",
    title="100,000 arithmetic expressions in x, with their grammar",
    licence="none: they are generated",
    citation="Kusner, Paige, Hernández-Lobato: Grammar Variational Autoencoder, ICML 2017, arXiv:1703.01925",
    kind="tokens",
    shape=(19,),
    splits={"train": 90_000, "test": 10_000},
    read=read_expressions,
)
