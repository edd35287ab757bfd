"""Context-free grammars: rules, a parser, leftmost derivations, and the enumeration of sentences."""

from __future__ import annotations

from glf_fast.grammar.derivation import Derivations, decode
from glf_fast.grammar.enumeration import sentences
from glf_fast.grammar.grammar import Grammar, Rule
from glf_fast.grammar.parser import Parser
from glf_fast.grammar.text import read, write

__all__ = ["EXPRESSIONS", "SMILES", "Derivations", "Grammar", "Parser", "Rule", "decode", "read", "sentences", "write"]

# Arithmetic expressions of one variable: the grammar of arXiv:1703.01925, section 4.1, as its released code has it.
EXPRESSIONS = """\
S -> S '+' T | S '*' T | S '/' T | T
T -> '(' S ')' | 'sin(' S ')' | 'exp(' S ')' | 'x' | '1' | '2' | '3'
"""

# SMILES of drug-like molecules (opensmiles.org). A tail is what follows an atom, so that one character decides on the rule.
SMILES = r"""
molecule -> atom tail
tail -> | digit tail | '(' branch ')' tail | atom tail | bond bonded
branch -> atom tail | bond atom tail
bonded -> digit tail | atom tail
bond -> '-' | '=' | '#' | ':' | '/' | '\\'
digit -> '1' | '2' | '3' | '4' | '5' | '6' | '7' | '8' | '9'
atom -> organic | aromatic | '[' isotope symbol chirality hydrogens charge ']'
organic -> 'B' | 'C' | 'N' | 'O' | 'S' | 'P' | 'F' | 'Cl' | 'Br' | 'I'
aromatic -> 'b' | 'c' | 'n' | 'o' | 's' | 'p'
isotope -> | digit | digit digit
symbol -> organic | aromatic | 'H' | 'Si' | 'Se'
chirality -> | '@' | '@@'
hydrogens -> | 'H' | 'H' digit
charge -> | '+' | '-' | '+' digit | '-' digit
"""
