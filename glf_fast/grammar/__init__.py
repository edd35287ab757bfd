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

# SMILES (opensmiles.org) without wildcards, atom classes and rarer elements. A tail is what follows an atom, so that one
# character decides on the rule. Elements such as Sn are two terminals: outside of brackets, Sn is S beside an aromatic n.
SMILES = r"""
molecule -> atom tail
tail -> | ring tail | '(' branch ')' tail | atom tail | bond bonded | '.' molecule
branch -> atom tail | bond atom tail | '.' molecule
bonded -> ring tail | atom tail
bond -> '-' | '=' | '#' | ':' | '/' | '\\'
ring -> digit | '%' digit digit
digit -> '0' | '1' | '2' | '3' | '4' | '5' | '6' | '7' | '8' | '9'
atom -> organic | aromatic | '[' isotope symbol chirality hydrogens charge ']'
organic -> 'B' | 'C' | 'N' | 'O' | 'S' | 'P' | 'F' | 'Cl' | 'Br' | 'I'
aromatic -> 'b' | 'c' | 'n' | 'o' | 's' | 'p'
isotope -> | digit | digit digit | digit digit digit
symbol -> 'H' | 'B' | 'C' | 'N' | 'O' | 'S' | 'P' | 'F' | 'Cl' | 'Br' | 'I' | aromatic | 'se' | 'as'
symbol -> 'Li' | 'Na' | 'K' | 'C' 's' | 'Mg' | 'Ca' | 'Sr' | 'Ba' | 'Al' | 'Si' | 'Ga' | 'Ge' | 'As' | 'Se' | 'I' 'n' | 'S' 'n'
symbol -> 'S' 'b' | 'Te' | 'Tl' | 'P' 'b' | 'Bi' | 'Ti' | 'V' | 'Cr' | 'Mn' | 'Fe' | 'C' 'o' | 'Ni' | 'Cu' | 'Zn' | 'Zr' | 'Mo'
symbol -> 'Ru' | 'Rh' | 'Pd' | 'Ag' | 'Cd' | 'W' | 'Re' | 'O' 's' | 'Ir' | 'Pt' | 'Au' | 'Hg' | 'Gd' | 'Tc'
chirality -> | '@' | '@@'
hydrogens -> | 'H' | 'H' digit
charge -> | '+' | '-' | '+' '+' | '-' '-' | '+' digit | '-' digit
"""
