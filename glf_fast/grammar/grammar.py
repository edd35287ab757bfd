"""A context-free grammar from its text, checked, with what a decoder must know of its rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from glf_fast.errors import UserError, did_you_mean

__all__ = ["Grammar", "Rule"]

_TOKEN = re.compile(r"""\s*(?:'((?:[^'\\]|\\.)+)'|"((?:[^"\\]|\\.)+)"|([A-Za-z_]\w*)|(\|)|(\S))""")


@dataclass(frozen=True)
class Rule:
    """A rule A → α.

    Attributes:
        left: the nonterminal A.
        right: the symbols of α in order; a terminal is (text, True), a nonterminal (name, False).
    """

    left: str
    right: tuple[tuple[str, bool], ...]

    @property
    def nonterminals(self) -> tuple[str, ...]:
        """The nonterminals of α, in order."""
        return tuple(name for name, terminal in self.right if not terminal)

    @property
    def terminals(self) -> tuple[str, ...]:
        """The terminals of α, in order."""
        return tuple(text for text, terminal in self.right if terminal)

    def __str__(self) -> str:
        right = " ".join(repr(symbol) if terminal else symbol for symbol, terminal in self.right)
        return f"{self.left} -> {right}".rstrip()


class Grammar:
    """A context-free grammar.

    A sequence of rules of length R is the leftmost derivation of a sentence, filled up with the padding rule, whose index is
    the number of rules.

    Attributes:
        text: the text it was read from, see `of`.
        rules: all rules, in the order of the text.
        nonterminals: names, in the order of their first rule; derivations begin with the first one.
        terminals: texts, in the order in which they first stand in the rules.
        characters: the characters of the terminals, sorted.
        padding: index of the padding rule.
        left: index of each rule's nonterminal, int64 (rules + 1,); the padding rule belongs to the empty stack, whose index
            is the number of nonterminals.
        masks: which rules each nonterminal, and last the empty stack, allows: bool (nonterminals + 1, rules + 1).
        least: rules in the shortest derivation from each nonterminal, int64 (nonterminals + 1,); 0 for the empty stack.
    """

    def __init__(self, text: str, rules: tuple[Rule, ...]) -> None:
        self.text, self.rules, self.padding = text, rules, len(rules)
        self.nonterminals = tuple(dict.fromkeys(rule.left for rule in rules))
        self.terminals = tuple(dict.fromkeys(text for rule in rules for text in rule.terminals))
        self.characters = tuple(sorted(set("".join(self.terminals))))
        index = {name: i for i, name in enumerate(self.nonterminals)}
        lefts = [*(index[rule.left] for rule in rules), len(index)]
        self.left = torch.tensor(lefts)
        self.masks = torch.arange(len(index) + 1)[:, None] == self.left
        self.least = torch.tensor([*_least(rules).values(), 0])

    @staticmethod
    @cache
    def of(text: str, where: str = "the grammar") -> Grammar:
        """The grammar of a text with lines such as `T -> '(' S ')' | 'x'`; an alternative may be empty.

        Terminals are in quotes, with backslashes as in Python. Lines that begin with # are comments. The first nonterminal is
        that of sentences.

        Args:
            where: name of the file, for messages.

        Raises:
            UserError: a line that is no rule; a nonterminal without rules, without an end, or of no use; a rule twice.
        """
        rules: dict[Rule, int] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            for rule in _rules(line, f"{where}, line {number}"):
                if rule in rules:
                    raise UserError(
                        f"{where}, line {number} has the rule {rule} again, after line {rules[rule]}; remove it"
                    )
                rules[rule] = number
        if not rules:
            raise UserError(f"{where} has no rules; write lines such as S -> 'x' | '(' S ')'")
        known = {rule.left for rule in rules}
        for rule, number in rules.items():
            if missing := [name for name in rule.nonterminals if name not in known]:
                hint = did_you_mean(missing[0], known) or "put terminals in quotes; "
                raise UserError(f"{where}, line {number}: there is no rule for {missing[0]}; {hint}or add a rule")
        least = _least(tuple(rules))
        if endless := [name for name, count in least.items() if count is None]:
            raise UserError(f"{where}: what is derived from {endless[0]} never ends; add a rule without {endless[0]}")
        start = next(iter(rules)).left
        reached, new = {start}, [start]
        while new:
            name = new.pop()
            found = {n for rule in rules if rule.left == name for n in rule.nonterminals} - reached
            reached |= found
            new += found
        if unused := [name for name in least if name not in reached]:
            raise UserError(f"{where}: nothing that begins with {start} uses {unused[0]}; remove its rules")
        return Grammar(text, tuple(rules))

    def derive(self, derivation: list[int]) -> list[str]:
        """The terminals of the sentence with this leftmost derivation, rules without padding.

        Raises:
            ValueError: the rules are no derivation of a sentence.
        """
        stack: list[tuple[str, bool]] = [(self.nonterminals[0], False)]
        sentence, rest = [], iter(derivation)
        while stack:
            symbol, terminal = stack.pop()
            if terminal:
                sentence.append(symbol)
                continue
            rule = self.rules[index] if (index := next(rest, None)) is not None else None
            if rule is None or rule.left != symbol:
                raise ValueError(f"no derivation: {symbol} is followed by {'nothing' if rule is None else rule}")
            stack += reversed(rule.right)
        if next(rest, None) is not None:
            raise ValueError("no derivation: there are rules after the end of the sentence")
        return sentence

    def one_hot(self, derivations: Tensor) -> Tensor:
        """Rules (B, R) as float32 (B, R, rules + 1)."""
        return torch.nn.functional.one_hot(derivations, self.padding + 1).float()


def _rules(line: str, where: str) -> list[Rule]:
    """The rules of a line."""
    head = re.match(r"\s*([A-Za-z_]\w*)\s*(?:->|→)", line)
    if not head:
        raise UserError(f"{where} is no rule: {line.strip()!r}; rules are written S -> 'x' | '(' S ')'")
    right: list[list[tuple[str, bool]]] = [[]]
    rest = line[head.end() :]
    for single, double, name, bar, other in _TOKEN.findall(rest):
        if other:
            raise UserError(
                f"{where}: {other!r} is neither a name nor in quotes; put terminals in quotes, as in '{other}'"
            )
        if bar:
            right.append([])
        else:
            text = single or double
            right[-1].append((re.sub(r"\\(.)", r"\1", text), True) if text else (name, False))
    return [Rule(head[1], tuple(symbols)) for symbols in right]


def _least(rules: tuple[Rule, ...]) -> dict[str, int | None]:
    """The number of rules in the shortest derivation from each nonterminal; None if there is none."""
    least: dict[str, int | None] = dict.fromkeys(rule.left for rule in rules)
    changed = True
    while changed:
        changed = False
        for rule in rules:
            counts = [least[name] for name in rule.nonterminals]
            if None in counts:
                continue
            count, before = 1 + sum(c for c in counts if c is not None), least[rule.left]
            if before is None or count < before:
                least[rule.left], changed = count, True
    return least
