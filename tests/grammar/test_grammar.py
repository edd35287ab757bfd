"""Grammars: what is read, the enumeration, parsing as the inverse of deriving, and masks that allow derivations alone."""

import hashlib
import itertools
import random

import pytest
import torch

from glf_fast.errors import UserError
from glf_fast.grammar import EXPRESSIONS, SMILES, Derivations, Grammar, Parser, decode, sentences
from glf_fast.grammar.grammar import Rule

COUNT, DEPTH = 100_000, 6
# One with rules without symbols, and one whose shortest derivations from two nonterminals differ.
EMPTY = "S -> 'a' B S | \nB -> 'b' | '(' S ')' | "
UNEVEN = "S -> A '.' | B S\nA -> 'x' | 'y' A\nB -> C C '!'\nC -> '0' | '1'"
MOLECULES = (
    "CC(C)(C)c1ccc2occ(CC(=O)Nc3ccccc3F)c2c1",
    "C[C@@H]1CC(Nc2cncc(-c3nncn3C)c2)C[C@@H](C)C1",
    "N#Cc1ccc(-c2ccc(O[C@@H](C(=O)N3CCCC3)c3ccccc3)cc2)cc1",
    "CC/C=C\\C[NH2+]C",
    "C1CC1(Br)C#N",
    "CC(=O)[O-].[Na+]",
    "C%10CC%10",
    "C0CC0.Cn1cccc1.Sc1ccccc1.Sn1cccc1",
    "[Fe+2].[O--].[Ca++].[Al+3]",
    "[131I]C[Sn](C)(C)C.[Co].[Pb+2].[cH-]1[se]cc1",
)


def expressions() -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    return list(itertools.islice(sentences(Grammar.of(EXPRESSIONS), DEPTH), COUNT))


def test_the_enumeration_is_the_data_of_the_paper() -> None:
    """Its SHA-256 is that of equation2_15_dataset.txt in github.com/mkusner/grammarVAE."""
    grammar = Grammar.of(EXPRESSIONS)
    found = expressions()
    text = "".join(" ".join(terminals) + "\n" for terminals, _ in found)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "ae9850311e884f888491f56dca57ef3c2f9880899e63d26b5da3b71840591ca2"
    )
    assert len(list(sentences(grammar, 5))) == 2512 and len(list(sentences(grammar, 4))) == 52
    assert not list(sentences(grammar, 1))
    counts = [len(rules) for _, rules in found]
    assert [counts.count(n) for n in (8, 10, 12, 14)] == [624, 3748, 28092, 67536]


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.long)])
def test_parsing_is_the_inverse_of_deriving(step: int) -> None:
    """All 100,000 expressions take 3 s of a processor for the parser alone."""
    grammar, parser = Grammar.of(EXPRESSIONS), Parser.of(EXPRESSIONS)
    for terminals, rules in expressions()[::step]:
        assert grammar.derive(list(rules)) == list(terminals)
        assert parser.parse("".join(terminals)) == list(rules)


@pytest.mark.parametrize("text", [EXPRESSIONS, SMILES, EMPTY, UNEVEN])
def test_random_derivations_are_parsed_as_they_were_derived(text: str) -> None:
    grammar, parser = Grammar.of(text), Parser.of(text)
    logits = torch.randn(200, 40, grammar.padding + 1, generator=torch.Generator().manual_seed(0))
    derivations, ended = decode(grammar, logits)
    assert ended.all()
    for row in derivations.tolist():
        rules = [rule for rule in row if rule != grammar.padding]
        assert row == rules + [grammar.padding] * (40 - len(rules))
        assert parser.parse("".join(grammar.derive(rules))) == rules


@pytest.mark.parametrize(("text", "steps"), [(EXPRESSIONS, 6), (EMPTY, 6), (UNEVEN, 7)])
@pytest.mark.parametrize("ending", [True, False])
def test_masks_allow_exactly_the_derivations(text: str, steps: int, ending: bool) -> None:
    """All sequences of allowed rules, by breadth first, are all derivations, by rewriting from the left."""
    grammar = Grammar.of(text)
    wanted: set[tuple[int, ...]] = set()
    open_ends = [((), (grammar.nonterminals[0],))]
    while open_ends:
        rules, stack = open_ends.pop()
        if len(rules) == steps:
            if not stack or not ending:
                wanted.add(rules)
        elif not stack:
            wanted.add(rules + (grammar.padding,) * (steps - len(rules)))
        else:
            for i, rule in enumerate(grammar.rules):
                if rule.left == stack[0]:
                    open_ends.append(((*rules, i), (*rule.nonterminals, *stack[1:])))

    prefixes = torch.zeros(1, 0, dtype=torch.int64)
    for _ in range(steps):
        derivations = Derivations(grammar, len(prefixes), steps, ending=ending)
        for column in prefixes.unbind(1):
            assert derivations.allowed().gather(1, column[:, None]).all()
            derivations.apply(column)
        row, rule = derivations.allowed().nonzero().unbind(1)
        prefixes = torch.cat([prefixes[row], rule[:, None]], 1)
    assert {tuple(row) for row in prefixes.tolist()} == wanted and len(prefixes) == len(wanted) > 10


def test_a_grammar_knows_its_rules() -> None:
    grammar = Grammar.of("# a comment\nS -> S '+' T | T\n\nT → \"it's\" | '\\'' | 'sin(' S ')'")
    assert grammar.nonterminals == ("S", "T") and grammar.terminals == ("+", "it's", "'", "sin(", ")")
    assert grammar.rules[0] == Rule("S", (("S", False), ("+", True), ("T", False)))
    assert str(grammar.rules[4]) == "T -> 'sin(' S ')'"
    assert grammar.characters == tuple(sorted(set("+it's'sin()")))
    assert grammar.least.tolist() == [2, 1, 0] and grammar.left.tolist() == [0, 0, 1, 1, 1, 2]
    assert grammar.masks.int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    hot = grammar.one_hot(torch.tensor([[1, 2, 5]]))
    assert hot.shape == (1, 3, 6) and hot.argmax(2).tolist() == [[1, 2, 5]] and hot.sum() == 3
    with pytest.raises(ValueError, match="no derivation: S is followed by T -> "):
        grammar.derive([0, 2])
    with pytest.raises(ValueError, match="no derivation: T is followed by nothing"):
        grammar.derive([1])
    with pytest.raises(ValueError, match="rules after the end"):
        grammar.derive([1, 2, 3])
    with pytest.raises(ValueError, match="1 rules are too few; the shortest derivation has 2"):
        Derivations(grammar, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "g has no rules; write lines such as"),
        ("S > 'x'", "g, line 1 is no rule: \"S > 'x'\"; rules are written S -> 'x'"),
        ("S -> 'x' +", "g, line 1: '+' is neither a name nor in quotes; put terminals in quotes, as in '+'"),
        ("S -> 'x", "is neither a name nor in quotes"),
        ("S -> Tee\nTea -> 'x'", "g, line 1: there is no rule for Tee; did you mean 'Tea'? or add a rule"),
        ("S -> x", "g, line 1: there is no rule for x; put terminals in quotes; or add a rule"),
        ("S -> 'x' | '(' S ')'\n\nS -> 'x'", "g, line 3 has the rule S -> 'x' again, after line 1; remove it"),
        ("S -> 'x' S", "g: what is derived from S never ends; add a rule without S"),
        ("S -> 'x'\nT -> 'y'", "g: nothing that begins with S uses T; remove its rules"),
        ("S -> S '+' S | 'x'", "g is ambiguous, or one terminal does not decide: at '+' both S -> S '+' S and "),
        ("S -> A | B\nA -> 'x'\nB -> 'x'", "at the end both B -> 'x' and A -> 'x' are possible; rewrite it"),
    ],
)
def test_a_bad_grammar_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Parser.of(text, "g")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("grammar", "text", "message"),
    [
        (EXPRESSIONS, "x+", "'x+' does not parse: at character 3 is the end, where '(', '1', '2', '3', 'exp('"),
        (EXPRESSIONS, "", "'' does not parse: at character 1 is the end"),
        (EXPRESSIONS, "x+y", "at character 3 is 'y', where"),
        (EXPRESSIONS, "xy", "at character 2 is 'y', where ')', '*', '+', '/', the end may stand"),
        (EXPRESSIONS, "(x))", "at character 4 is ')', where"),
        (EXPRESSIONS, "sin x", "at character 1 is 'sin x', where"),
        (SMILES, "CC(C", "at character 5 is the end"),
        (SMILES, "C%1C", "at character 4 is 'C', where '0', '1'"),
        (SMILES, "CC.", "at character 4 is the end"),
        (SMILES, "C--C", "at character 3 is '-C', where"),
        (SMILES, "NaCl", "at character 1 is 'NaCl', where"),
    ],
)
def test_what_does_not_parse_is_one_line(grammar: str, text: str, message: str) -> None:
    parser = Parser.of(grammar)
    with pytest.raises(UserError) as error:
        parser.parse(text)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not parser.parses(text)


def test_words_between_sentences_do_not_parse() -> None:
    """Texts of random terminals: the parser takes those alone that some derivation has."""
    parser, choose = Parser.of(UNEVEN), random.Random(0)
    short = {"".join(terminals) for terminals, _ in sentences(Grammar.of(UNEVEN), 6)}
    for _ in range(2000):
        text = "".join(choose.choices(Grammar.of(UNEVEN).terminals, k=choose.randrange(1, 5)))
        assert parser.parses(text) == (text in short)


@pytest.mark.parametrize("molecule", MOLECULES)
def test_molecules_parse(molecule: str) -> None:
    parser = Parser.of(SMILES)
    assert "".join(parser.grammar.derive(parser.parse(molecule))) == molecule
