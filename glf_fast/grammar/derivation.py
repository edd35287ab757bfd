"""Leftmost derivations that are chosen rule by rule, for a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.grammar.grammar import Grammar

__all__ = ["Derivations", "decode"]


class Derivations:
    """The stacks of B derivations of at most `steps` rules, which all begin with the grammar's first nonterminal.

    Args:
        grammar: the grammar.    count: B.    steps: rules of a derivation, with padding.
        ending: whether to allow only rules after which the derivation can still end within its steps. Then every
            sequence of allowed rules is a derivation of a sentence, and every derivation of at most `steps` rules is allowed.

    Raises:
        ValueError: no derivation is as short as `steps`.
    """

    def __init__(
        self, grammar: Grammar, count: int, steps: int, *, ending: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        nonterminals = [[grammar.nonterminals.index(name) for name in rule.nonterminals] for rule in grammar.rules]
        widest = max(map(len, nonterminals))
        empty = len(grammar.nonterminals)
        if ending and steps < int(grammar.least[0]):
            raise ValueError(f"{steps} rules are too few; the shortest derivation has {int(grammar.least[0])}")
        # What a rule puts on the stack, the leftmost nonterminal on top, and how many nonterminals these are.
        pushed = [[*reversed(names), *[empty] * (widest - len(names))] for names in nonterminals]
        self._pushed = torch.tensor([*pushed, [empty] * widest], device=device).view(-1, widest)
        self._sizes = torch.tensor([*map(len, nonterminals), 0], device=device)
        self._masks, self._left, self._least = (t.to(device) for t in (grammar.masks, grammar.left, grammar.least))
        # Rules that end a derivation as early as possible after each rule, without this rule.
        self._after = self._least[self._pushed].sum(1)
        # The bottom of a stack is the empty stack itself.
        self._stack = torch.full((count, 2 + steps * max(widest, 1)), empty, device=device)
        self._stack[:, 1] = 0
        self._top = torch.ones(count, dtype=torch.int64, device=device)
        self._needed = self._least[:1].repeat(count)
        self._steps, self._ending = steps, ending

    def allowed(self) -> Tensor:
        """The rules that may come next: bool (B, rules + 1)."""
        top = self._stack.gather(1, self._top[:, None])[:, 0]
        allowed = self._masks[top]
        if self._ending:
            needed = (self._needed - self._least[top])[:, None] + self._after
            allowed = allowed & (needed <= self._steps - 1)
        return allowed

    def apply(self, rules: Tensor) -> None:
        """Replace the nonterminals on top of the stacks by these allowed rules, int64 (B,)."""
        top = self._stack.gather(1, self._top[:, None])[:, 0]
        self._needed += self._after[rules] - self._least[top]
        below = self._top - (top < len(self._masks) - 1).long()  # the bottom stays
        places = below[:, None] + 1 + torch.arange(self._pushed.shape[1], device=rules.device)
        self._stack.scatter_(1, places, self._pushed[rules])
        self._top = below + self._sizes[rules]
        self._steps -= 1

    @property
    def ended(self) -> Tensor:
        """Which stacks are empty: bool (B,)."""
        return self._stack.gather(1, self._top[:, None])[:, 0] == len(self._masks) - 1


def decode(grammar: Grammar, logits: Tensor, *, ending: bool = True) -> tuple[Tensor, Tensor]:
    """The most probable allowed rule at each step, given the rules before: int64 (B, R), for logits (B, R, rules + 1).

    Returns also which derivations have ended, bool (B,): all of them if `ending`, see `Derivations`.
    """
    derivations = Derivations(grammar, len(logits), logits.shape[1], ending=ending, device=logits.device)
    chosen = []
    for scores in logits.unbind(1):
        rules = scores.masked_fill(~derivations.allowed(), -torch.inf).argmax(1)
        derivations.apply(rules)
        chosen.append(rules)
    return torch.stack(chosen, 1), derivations.ended
