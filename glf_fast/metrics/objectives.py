"""Numbers by which sequences are judged, lower is better: how far an expression is from a target, a molecule's QED."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from glf_fast.errors import UserError
from glf_fast.grammar import EXPRESSIONS, Grammar, Parser

__all__ = ["OBJECTIVES", "Objective"]

# The target of arXiv:1703.01925, and where expressions are compared with it.
TARGET = "1/3+x+sin(x*x)"
POINTS = np.linspace(-10, 10, 1000)
# Squared errors beyond this count as this.
WORST = 1000.0


@dataclass(frozen=True)
class Objective:
    """A number by which sequences are judged, lower is better.

    Attributes:
        title: what the number is, in a line.
        value: the number of a text; None for texts without one, such as molecules with wrong valences.
        check: raises UserError if something that `value` needs is not installed.
    """

    title: str
    value: Callable[[str], float | None]
    check: Callable[[], None] = lambda: None


def expression_score(text: str) -> float:
    """log(1 + mean of min((f(x) − y)², 1000)) at 1,000 points of [−10, 10], with y = 1/3 + x + sin(x²).

    It is log 1001 if f is not finite at one of them.

    Raises:
        UserError: the text is no expression.
    """
    with np.errstate(all="ignore"):
        values = np.broadcast_to(evaluated(text), POINTS.shape)
        if not np.isfinite(values).all():
            return math.log1p(WORST)
        return math.log1p(float(np.minimum((values - _target()) ** 2, WORST).mean()))


@cache
def _target() -> Any:
    return evaluated(TARGET)


def evaluated(text: str) -> Any:
    """The values of an expression at `POINTS`, from its derivation; no text is ever executed."""
    derivation = Parser.of(EXPRESSIONS).parse(text)
    grammar = Grammar.of(EXPRESSIONS)
    # A leftmost derivation is a tree in prefix order: from its end, the operands of each rule lie on top of the stack, the
    # left one uppermost. Recursion would end at a thousand brackets.
    values: list[Any] = []
    for index in reversed(derivation):
        rule = grammar.rules[index]
        operands = [values.pop() for _ in rule.nonterminals]
        values.append(_MEANINGS[rule.terminals](*operands))
    return values.pop()


_MEANINGS: dict[tuple[str, ...], Callable[..., Any]] = {
    ("+",): np.add,
    ("*",): np.multiply,
    ("/",): np.divide,
    ("sin(", ")"): np.sin,
    ("exp(", ")"): np.exp,
    ("(", ")"): lambda a: a,
    (): lambda a: a,
    ("x",): lambda: POINTS,
    ("1",): lambda: np.float64(1),
    ("2",): lambda: np.float64(2),
    ("3",): lambda: np.float64(3),
}


def negative_qed(text: str) -> float | None:
    """Minus RDKit's QED (Bickerton et al., 2012), the drug-likeness in [0, 1]; None for what RDKit takes for no molecule."""
    _check_rdkit()
    from rdkit import Chem, RDLogger
    from rdkit.Chem import QED

    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    molecule = Chem.MolFromSmiles(text)
    return -float(QED.qed(molecule)) if molecule is not None and molecule.GetNumAtoms() else None


def _check_rdkit() -> None:
    try:
        import rdkit  # noqa: F401
    except ImportError as error:
        raise UserError('properties of molecules are computed by RDKit: pip install "glf_fast[molecules]"') from error


OBJECTIVES: dict[str, Objective] = {
    "expression": Objective("log(1 + MSE) against 1/3 + x + sin(x·x)", expression_score),
    "molecule": Objective("−QED of the molecule", negative_qed, _check_rdkit),
}
