"""Token sequences: in memory and from .npz files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glf_fast.data import TokenDataset, load
from glf_fast.errors import UserError

VOCABULARY = ("<pad>", "x", "+", "1")
TOKENS = torch.tensor([[1, 2, 3], [1, 0, 0], [3, 2, 0], [0, 0, 0]])


def test_lengths_and_fingerprint() -> None:
    data = TokenDataset.of("t", "train", TOKENS, VOCABULARY)
    assert data.kind == "tokens" and data.shape == (3,) and len(data) == 4
    assert data.vocabulary == VOCABULARY and data.padding == 0
    assert data.lengths.tolist() == [3, 1, 2, 0]
    for other in (
        TokenDataset.of("t", "train", TOKENS, ("<pad>", "x", "-", "1")),
        TokenDataset.of("t", "train", TOKENS.flip(0), VOCABULARY),
        TokenDataset.of("t", "train", TOKENS[:1], VOCABULARY, padding=0),
    ):
        assert other.fingerprint != data.fingerprint
    last = TokenDataset.of("t", "train", TOKENS[:1], VOCABULARY, padding=3)
    assert last.lengths.tolist() == [2]


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", tokens=TOKENS.numpy().astype(np.uint8), vocabulary=VOCABULARY, labels=range(4))
    train, test = (load(str(tmp_path / "a.npz"), split) for split in ("train", "test"))
    assert isinstance(train, TokenDataset) and train.items.dtype == torch.int64
    assert sorted(train.items.tolist() + test.items.tolist()) == sorted(TOKENS.tolist())
    assert [TOKENS[i].tolist() for i in train.labels] == train.items.tolist()
    np.savez(tmp_path / "b.npz", train=TOKENS[:1], test=TOKENS[:1] - 1, vocabulary=VOCABULARY, padding=3)
    train, test = (load(str(tmp_path / "b.npz"), split) for split in ("train", "test"))
    assert train.padding == 3 and train.lengths.tolist() == [2] and test.lengths.tolist() == [3]


@pytest.mark.parametrize(
    ("tokens", "about", "message"),
    [
        (TOKENS + 1, {}, "sequence 0 has token 4 at position 2; the vocabulary has indices 0 … 3"),
        (TOKENS - 1, {}, "sequence 1 has token -1 at position 1; the vocabulary has"),
        (
            torch.tensor([[1, 2], [0, 1]]),
            {},
            r"sequence 1 has padding \(0\) at position 0 and further tokens behind it",
        ),
        (TOKENS.double(), {}, "holds float64; tokens are integers, indices into the vocabulary"),
        (TOKENS[:, :0], {}, r"must hold int64 tokens \(N, L\), N ≥ 1, L ≥ 1"),
        (TOKENS, {"vocabulary": ["a", "b", "a"]}, "holds 'a' twice"),
        (TOKENS, {"vocabulary": [0, 1, 2]}, "vocabulary must be a list of strings; got int64"),
        (TOKENS, {"vocabulary": np.array(["a", None])}, "pickled objects are never loaded"),
        (TOKENS, {"padding": 4}, "must be an index in 0 … 3; got 4"),
        (TOKENS, {"padding": [0, 1]}, "padding must be one integer"),
        (TOKENS, {"labels": [0]}, "4 items but 1 labels"),
    ],
)
def test_bad_tokens(tmp_path: Path, tokens: torch.Tensor, about: dict, message: str) -> None:
    np.savez(
        tmp_path / "t.npz",
        train=tokens,
        train_labels=about.pop("labels", np.zeros(len(tokens))),
        test=tokens,
        **{"vocabulary": VOCABULARY, **about},
    )
    with pytest.raises(UserError, match=message) as error:
        load(str(tmp_path / "t.npz"))
    assert "\n" not in str(error.value)
