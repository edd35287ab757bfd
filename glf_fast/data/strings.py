"""The user's strings: SMILES, or sentences of a grammar of one's own, one a line, as sequences of characters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import numpy as np
import torch

from glf_fast.data.dataset import TokenDataset, split_off_test
from glf_fast.errors import UserError
from glf_fast.grammar import SMILES, Parser

__all__ = ["load_smiles", "load_strings", "token_dataset"]

POLICY = "test: a tenth of a fixed random order"
# The character that fills up short strings. No terminal may contain it.
_PADDING = " "


def load_smiles(path: Path, split: str) -> TokenDataset:
    """A split of the molecules of a .smi file: the first word of each line is a molecule, the rest of the line its name.

    NAME.grammar beside NAME.smi, if there is one, replaces the grammar of SMILES; its sentences are molecules all the same.

    Raises:
        UserError: a line that is no sentence of the grammar, with its number; an empty file; a wrong grammar.
    """
    grammar = path.with_suffix(".grammar")
    text, where = (_read(grammar), str(grammar)) if grammar.is_file() else (SMILES, "the grammar of SMILES")
    parser = Parser.of(text, where)
    lines = [(number, line.split()[0]) for number, line in _lines(path)]
    return _load(path, split, lines, parser, where, "molecule")


def load_strings(path: Path, split: str) -> TokenDataset:
    """A split of the sentences in a .txt file, one a line, without their blanks. NAME.grammar beside NAME.txt is their grammar.

    Raises:
        UserError: a line that is no sentence of the grammar, with its number; an empty file; a wrong or missing grammar.
    """
    grammar = path.with_suffix(".grammar")
    if not grammar.is_file():
        raise UserError(f"{path} needs its grammar beside it, {grammar.name}, with lines such as S -> 'x' | '(' S ')'")
    lines = [(number, "".join(line.split())) for number, line in _lines(path)]
    return _load(path, split, lines, Parser.of(_read(grammar), str(grammar)), str(grammar), "")


def token_dataset(
    name: str, split: str, strings: Sequence[str], grammar: str, objective: str, policy: str
) -> TokenDataset:
    """A split of sentences of a grammar as sequences of characters, of which the first is the padding."""
    vocabulary = (_PADDING, *Parser.of(grammar).grammar.characters)
    length = max(map(len, strings))
    codes = np.array([string.ljust(length, _PADDING) for string in strings], dtype=f"<U{length}").view(np.uint32)
    index = np.zeros(max(map(ord, vocabulary)) + 1, np.int64)
    index[[ord(character) for character in vocabulary]] = np.arange(len(vocabulary))
    tokens = torch.from_numpy(index[codes.reshape(len(strings), length)])
    tokens, _ = split_off_test(name, tokens, None, split)
    return TokenDataset.of(name, split, tokens, vocabulary, 0, None, policy, grammar, objective)


def _load(
    path: Path, split: str, lines: Sequence[tuple[int, str]], parser: Parser, where: str, objective: str
) -> TokenDataset:
    if not lines:
        raise UserError(f"{path} is empty; it must have at least two lines")
    if _PADDING in parser.grammar.characters:
        raise UserError(f"{where} has a terminal with a blank, which separates words; leave blanks out")
    for number, string in lines:
        try:
            parser.parse(string)
        except UserError as error:
            own = path.with_suffix(".grammar")
            write = (
                "" if own.is_file() else f", which python -m glf_fast.data grammar smiles > {quote(str(own))} writes"
            )
            raise UserError(
                f"{path}, line {number}: {error}; correct the line, or extend the grammar in {own}{write}"
            ) from error
    return token_dataset(str(path), split, [s for _, s in lines], parser.grammar.text, objective, POLICY)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it in UTF-8") from error


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    return [(number, line) for number, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
