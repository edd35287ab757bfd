"""Scores of sequences, the objective of expressions, and searches by expected improvement."""

import math
import sys

import numpy as np
import pytest

from glf_fast.errors import UserError
from glf_fast.metrics import search as searching
from glf_fast.metrics.objectives import OBJECTIVES, POINTS, evaluated, expression_score
from glf_fast.metrics.search import search
from glf_fast.metrics.sequences import score_texts


def test_shares_and_means_by_hand() -> None:
    value = {"a": 3.0, "b": 1.0, "c": None}.get
    found = score_texts(["a", "a", "b", "c", "", "?"], {"a"}, lambda text: text not in ("", "?"), value)
    assert found == {
        "n": 6, "valid": 3 / 6, "unique": 2 / 3, "novel": 1 / 2, "mean": pytest.approx(7 / 3),
        "deviation": pytest.approx(math.sqrt(4 / 3)), "best": [[1.0, "b"], [3.0, "a"]],
    }  # fmt: skip
    bare = score_texts(["a", "?"], (), str.isalpha)
    assert bare["valid"] == 0.5 and bare["novel"] == 1 and bare["mean"] is None and bare["best"] == []
    none = score_texts(["?"], (), str.isalpha, value)
    assert (none["valid"], none["unique"], none["novel"], none["mean"]) == (0, 0, 0, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/3+x+sin(x*x)", lambda x: 1 / 3 + x + math.sin(x * x)),
        ("x/2/3", lambda x: x / 2 / 3),
        ("2+x*3", lambda x: (2 + x) * 3),  # in this grammar all operators bind alike, from the left
        ("2+(x*3)", lambda x: 2 + x * 3),
        pytest.param("(" * 1500 + "x" + ")" * 1500, lambda x: x, id="brackets"),
        ("exp(1)*sin(x+3)", lambda x: math.e * math.sin(x + 3)),
    ],
)
def test_expressions_are_evaluated_as_their_grammar_reads_them(text: str, value: object) -> None:
    wanted = [value(x) for x in POINTS]
    np.testing.assert_allclose(np.broadcast_to(evaluated(text), POINTS.shape), wanted, rtol=1e-12)
    target = [1 / 3 + x + math.sin(x * x) for x in POINTS]
    error = sum(min((a - b) ** 2, 1000) for a, b in zip(wanted, target, strict=True)) / 1000
    assert expression_score(text) == pytest.approx(math.log(1 + error))


def test_what_is_not_finite_has_the_worst_score() -> None:
    assert expression_score("1/(x*0)".replace("0", "(1/exp(exp(exp(3))))")) == pytest.approx(math.log(1001))
    assert expression_score("exp(exp(x*x))") == pytest.approx(math.log(1001))
    with pytest.raises(UserError, match="does not parse"):
        expression_score("__import__('os')")


def test_a_search_finds_a_minimum_and_repeats_itself() -> None:
    def judge(z: np.ndarray) -> np.ndarray:
        seen.append(z)
        return ((z - 1.5) ** 2).sum(1)

    def draw(number: int, n: int) -> np.ndarray:
        return np.random.default_rng(number).standard_normal((n, 2))

    start = np.random.default_rng(0).standard_normal((40, 2))
    runs = []
    for _ in range(2):
        seen: list[np.ndarray] = []
        search(start, ((start - 1.5) ** 2).sum(1), judge, draw, rounds=2, batch=5, seed=3)
        runs.append(np.concatenate(seen))
    assert runs[0].shape == (10, 2) and np.array_equal(*runs)
    assert ((runs[0] - 1.5) ** 2).sum(1).min() < 0.2 * ((start - 1.5) ** 2).sum(1).min()
    assert len(np.unique(runs[0], axis=0)) == 10


def test_dimensions_that_the_encoder_does_not_use_are_in_nobodys_way() -> None:
    random = np.random.default_rng(0)
    start = random.standard_normal((60, 6)) * [1, 1, 0.01, 0.01, 0.01, 0.01]
    tried: list[float] = []

    def value(codes: np.ndarray) -> np.ndarray:
        return ((codes[:, :2] - 1.5) ** 2).sum(1)

    def judge(codes: np.ndarray) -> np.ndarray:
        tried.extend(value(codes))
        return value(codes)

    def draw(number: int, n: int) -> np.ndarray:
        return np.random.default_rng(number).standard_normal((n, 6))

    search(start, value(start), judge, draw, rounds=3, batch=20, seed=0)
    assert min(tried) < 0.2 * value(start).min() and np.median(tried) < 2


def test_a_known_point_promises_no_improvement() -> None:
    """Points that are observed ten times, with noise: the mean of ten is almost certain, and a new one far away is not."""
    random = np.random.default_rng(0)
    x = np.repeat(np.linspace(-2, 2, 9), 10)[:, None]
    y = 100 * (np.sin(2 * x[:, 0]) + 0.3 * random.standard_normal(90))
    mean, covariance = searching._posterior(x, y, np.array([[0.0], [6.0]]))
    assert covariance[0, 0] < 10**2 < 50**2 < covariance[1, 1]
    known, unknown = searching._improvement(mean, covariance.diagonal(), float(-100))
    assert known < 1e-6 < 1 < unknown


def test_a_batch_spreads() -> None:
    """Two candidates that are the same point: the second one brings nothing after the first."""
    covariance = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert searching._batch(np.array([0.0, 0.0, 0.5]), covariance, 0.2, 2) == [0, 2]


def test_molecules_have_rdkits_drug_likeness() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("the tests' RDKit is that of Python 3.11")
    value = OBJECTIVES["molecule"].value
    OBJECTIVES["molecule"].check()
    assert value("CC(=O)Oc1ccccc1C(=O)O") == pytest.approx(-0.550122, abs=1e-5)  # aspirin
    assert value("C(C)(C)(C)(C)C") is value("no molecule") is value("") is None


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("sklearn", "rdkit"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        searching.check_search()
    with pytest.raises(UserError, match=r'pip install "glf_fast\[molecules\]"'):
        OBJECTIVES["molecule"].check()
