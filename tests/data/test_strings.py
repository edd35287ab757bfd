"""Expressions, molecules and sentences of the user's own grammar, as sequences of characters."""

from pathlib import Path

import pytest

from glf_fast.data import SOURCES, TokenDataset, expected_kind, load
from glf_fast.data.expressions import all_expressions
from glf_fast.errors import UserError
from glf_fast.grammar import EXPRESSIONS, write

OWN = "S -> 'a' S | 'b'\n"


def texts(data: TokenDataset) -> list[str]:
    return write(data.items, data.vocabulary, data.padding)


def test_expressions_are_split_in_a_random_order() -> None:
    train, test = (load("expressions", split) for split in ("train", "test"))
    assert isinstance(train, TokenDataset) and isinstance(test, TokenDataset)
    assert {"train": len(train), "test": len(test)} == dict(SOURCES["expressions"].splits)
    assert train.shape == test.shape == SOURCES["expressions"].shape == (19,)
    assert train.vocabulary[train.padding] == " " and len(train.vocabulary) == 15
    assert train.grammar == EXPRESSIONS and train.objective == "expression"
    both = texts(train), texts(test)
    assert sorted(both[0] + both[1]) == sorted(all_expressions()) and "1/3+x+sin(x*x)" not in {*both[0], *both[1]}
    # The enumeration ends with quotients; the test split has its share of everything.
    assert 0.08 < sum("*" in text for text in both[1]) / sum("*" in text for text in both[0]) < 0.15
    again = load("expressions", "test")
    assert again.fingerprint == test.fingerprint != train.fingerprint


def test_molecules_and_own_sentences(tmp_path: Path) -> None:
    (tmp_path / "m.smi").write_text("CCO ethanol\nc1ccccc1\tbenzene, of coal\n\nC[C@@H](N)C(=O)O\n" * 4)
    train = load(str(tmp_path / "m.smi"), "train")
    assert isinstance(train, TokenDataset) and len(train) == 10 and train.objective == "molecule"
    assert set(texts(train)) == {"CCO", "c1ccccc1", "C[C@@H](N)C(=O)O"} and "molecule ->" in train.grammar
    (tmp_path / "s.txt").write_text("a a b\nb\nab\n")
    (tmp_path / "s.grammar").write_text(OWN)
    data = load(str(tmp_path / "s.txt"), "train")
    assert isinstance(data, TokenDataset) and data.vocabulary == (" ", "a", "b") and not data.objective
    assert set(texts(data)) <= {"aab", "b", "ab"} and data.shape == (3,) and data.grammar == OWN
    (tmp_path / "m.grammar").write_text("S -> S 'C' | 'C'")
    (tmp_path / "m.smi").write_text("CC\nC\nCCC\n")
    own = load(str(tmp_path / "m.smi"), "train")
    assert isinstance(own, TokenDataset) and own.vocabulary == (" ", "C") and own.objective == "molecule"


@pytest.mark.parametrize(
    ("name", "content", "grammar", "message"),
    [
        ("m.smi", "CCO\nCC(\n", None, "m.smi, line 2: 'CC(' does not parse: at character 4 is the end"),
        (
            "m.smi",
            "CCO\nC*\n",
            None,
            "extend the grammar in {0}, which python -m glf_fast.data grammar smiles > {0} writes",
        ),
        ("m.smi", "CCO ethanol\nethanol CCO\n", None, "m.smi, line 2: 'ethanol' does not parse: at character 1 is"),
        ("m.smi", "\n \n", None, "m.smi is empty"),
        ("m.smi", b"\xff\xfe", None, "m.smi is not UTF-8 text"),
        ("m.smi", "CCO\n", None, "m.smi holds 1 item(s); at least two are needed"),
        ("s.txt", "ab\n", None, "s.txt needs its grammar beside it, s.grammar, with lines such as"),
        ("s.txt", "ab\nba\n", OWN, "s.txt, line 2: 'ba' does not parse"),
        ("s.txt", "ab\nb\n", "S -> T", "s.grammar, line 1: there is no rule for T"),
        ("s.txt", "ab\nb\n", "S -> 'a b'", "s.grammar has a terminal with a blank"),
        ("s.txt", "ab\nb\n", b"\xff", "s.grammar is not UTF-8 text"),
    ],
)
def test_bad_files_are_one_line(
    tmp_path: Path, name: str, content: str | bytes, grammar: str | bytes | None, message: str
) -> None:
    files = {name: content, str(Path(name).with_suffix(".grammar")): grammar}
    for file, written in files.items():
        if written is not None:
            (tmp_path / file).write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(UserError) as error:
        load(str(tmp_path / name), "train")
    assert message.format(tmp_path / "m.grammar") in str(error.value) and "\n" not in str(error.value)


def test_the_kind_of_data_is_known_by_name() -> None:
    kinds = {
        source: expected_kind(source) for source in ("expressions", "mnist", "a.smi", "b/c.TXT", "d.csv", "e", "f.npz")
    }
    assert list(kinds.values()) == ["tokens", "images", "tokens", "tokens", "table", "images", "images"]
