"""An SLR(1) parser: from a sentence to its leftmost derivation, in a time proportional to its length."""

from __future__ import annotations

import re
from functools import cache

from glf_fast.errors import UserError
from glf_fast.grammar.grammar import Grammar

__all__ = ["Parser"]

_END = ""  # the terminal behind the last one
Symbol = tuple[str, bool]
Item = tuple[int, int]  # a rule, and how many of its symbols have been read; rule −1 is the one with the sentence alone


class Parser:
    """The parser of a grammar in which one terminal ahead decides on every rule (DeRemer 1971: SLR(1)).

    Such a grammar is not ambiguous: a sentence has one leftmost derivation. Text is divided into terminals from the left, of
    which the longest one is taken.

    Args:
        grammar: the grammar.    where: name of its file, for messages.

    Raises:
        UserError: two rules are possible at the same place.
    """

    def __init__(self, grammar: Grammar, where: str = "the grammar") -> None:
        self.grammar = grammar
        longest_first = sorted(grammar.terminals, key=len, reverse=True)
        self._terminals = re.compile("|".join(map(re.escape, longest_first)))
        # By state: what to do at a terminal (n ≥ 0: read it and go to state n; ~r: reduce by rule r), and where a nonterminal
        # leads.
        self._actions: list[dict[str, int]] = []
        self._goto: list[dict[str, int]] = []
        self._build(where)
        self._sizes = [(rule.left, len(rule.right)) for rule in grammar.rules]

    @staticmethod
    @cache
    def of(text: str, where: str = "the grammar") -> Parser:
        """The parser of the grammar with this text, see `Grammar.of`."""
        return Parser(Grammar.of(text, where), where)

    def parse(self, text: str) -> list[int]:
        """The leftmost derivation of a text, as indices of rules.

        Raises:
            UserError: the text is no sentence of the grammar; the message has the place.
        """
        actions, goto, sizes = self._actions, self._goto, self._sizes
        states: list[int] = [0]
        parts: list[list[int]] = []  # the derivation from each symbol on the stack, empty for terminals
        position, matched = 0, self._terminals.match(text)
        ahead = matched[0] if matched else _END
        while True:
            action = actions[states[-1]].get(ahead)
            if action is None or (ahead == _END and position < len(text)):
                raise self._error(text, position, states[-1])
            if action >= 0:
                states.append(action)
                parts.append([])
                position += len(ahead)
                matched = self._terminals.match(text, position)
                ahead = matched[0] if matched else _END
                continue
            rule = ~action
            if rule == self.grammar.padding:  # the whole text has been read
                return parts[0]
            left, size = sizes[rule]
            derivation = [rule]
            if size:
                for part in parts[-size:]:
                    derivation += part
                del states[-size:], parts[-size:]
            parts.append(derivation)
            states.append(goto[states[-1]][left])

    def parses(self, text: str) -> bool:
        """Whether a text is a sentence of the grammar."""
        try:
            self.parse(text)
        except UserError:
            return False
        return True

    def _error(self, text: str, position: int, state: int) -> UserError:
        wanted = sorted(repr(t) if t else "the end" for t in self._actions[state])
        got = repr(text[position : position + 12]) if position < len(text) else "the end"
        some = ", ".join(wanted[:8]) + (", …" if len(wanted) > 8 else "")
        shown = text if len(text) <= 60 else f"{text[:57]}…"
        return UserError(f"{shown!r} does not parse: at character {position + 1} is {got}, where {some} may stand")

    # -- tables -------------------------------------------------------------------------------------------------------------

    def _build(self, where: str) -> None:
        grammar, follow = self.grammar, _follow(self.grammar)
        sentence: tuple[Symbol, ...] = ((grammar.nonterminals[0], False),)

        def right(rule: int) -> tuple[Symbol, ...]:
            return grammar.rules[rule].right if rule >= 0 else sentence

        by_left: dict[str, list[int]] = {name: [] for name in grammar.nonterminals}
        for number, one in enumerate(grammar.rules):
            by_left[one.left].append(number)

        def closure(items: frozenset[Item]) -> frozenset[Item]:
            found, new = set(items), list(items)
            while new:
                rule, dot = new.pop()
                if dot < len(symbols := right(rule)) and not symbols[dot][1]:
                    more = {(r, 0) for r in by_left[symbols[dot][0]]} - found
                    found |= more
                    new += more
            return frozenset(found)

        states = {closure(frozenset({(-1, 0)})): 0}
        for items in (queue := list(states)):
            moves: dict[Symbol, set[Item]] = {}
            actions: dict[str, int] = {}
            reduced: dict[str, int] = {}
            for rule, dot in sorted(items):
                if dot < len(symbols := right(rule)):
                    moves.setdefault(symbols[dot], set()).add((rule, dot + 1))
                    continue
                for terminal in follow[grammar.rules[rule].left] if rule >= 0 else {_END}:
                    if terminal in reduced:
                        raise _conflict(where, terminal, grammar, rule, reduced[terminal])
                    reduced[terminal] = rule
                    actions[terminal] = ~(rule if rule >= 0 else grammar.padding)
            goto: dict[str, int] = {}
            for (name, is_terminal), kernel in moves.items():
                target = closure(frozenset(kernel))
                if target not in states:
                    states[target] = len(states)
                    queue.append(target)
                if is_terminal and name in reduced:
                    raise _conflict(where, name, grammar, reduced[name], min(kernel)[0])
                (actions if is_terminal else goto)[name] = states[target]
            self._actions.append(actions)
            self._goto.append(goto)


def _conflict(where: str, terminal: str, grammar: Grammar, *rules: int) -> UserError:
    shown = " and ".join(str(grammar.rules[rule]) if rule >= 0 else "the end of the sentence" for rule in rules)
    at = repr(terminal) if terminal else "the end"
    return UserError(
        f"{where} is ambiguous, or one terminal does not decide: at {at} both {shown} are possible; rewrite it"
    )


def _follow(grammar: Grammar) -> dict[str, set[str]]:
    """The terminals that may stand behind each nonterminal."""
    first: dict[str, set[str]] = {name: set() for name in grammar.nonterminals}
    follow: dict[str, set[str]] = {name: set() for name in grammar.nonterminals}
    empty: set[str] = set()  # nonterminals from which nothing can be derived
    follow[grammar.nonterminals[0]].add(_END)
    before = -1
    while before != (before := sum(map(len, (*first.values(), *follow.values(), empty)))):
        for rule in grammar.rules:
            # From the right: what may stand behind the symbols so far.
            behind, start, vanishes = set(follow[rule.left]), set[str](), True
            for name, terminal in reversed(rule.right):
                if terminal:
                    behind, start, vanishes = {name}, {name}, False
                    continue
                follow[name] |= behind
                if name in empty:
                    behind, start = behind | first[name], start | first[name]
                else:
                    behind, start, vanishes = set(first[name]), set(first[name]), False
            first[rule.left] |= start
            if vanishes:
                empty.add(rule.left)
    return follow
