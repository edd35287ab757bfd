"""Dropout's generator against its published known answers, and what is dropped."""

import pytest
import torch

from glf_fast.reference import Dropout
from glf_fast.reference.dropout import philox

# Counter, key and answer of Philox4x32-10, from the lowest word on: the known-answer tests of Random123.
ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    low, high = key
    seed = torch.tensor(high - (high >> 31 << 32)) << 32 | low  # 64 bits, of which the highest is a sign
    assert [int(word) for word in philox(seed, [torch.tensor(word) for word in counter])] == answer


def test_units_are_dropped_independently_and_the_mean_stays() -> None:
    h = torch.ones(2000, 50, dtype=torch.float64)
    drop = Dropout(0.3, torch.tensor(7), 0)
    found = [drop(h, 0), drop(h, 1), drop._replace(step=1)(h, 0), drop._replace(network=1)(h, 0),
             drop._replace(seed=torch.tensor(8))(h, 0), drop._replace(seed=torch.tensor(7 + 2**32))(h, 0)]  # fmt: skip
    error = (0.3 * 0.7 / h.numel()) ** 0.5
    for kept in found:
        assert set(kept.unique().tolist()) == {0.0, 1 / 0.7}
        assert abs((kept > 0).double().mean() - 0.7) < 4 * error
    for i, a in enumerate(found):
        for b in found[:i]:
            assert abs(((a > 0) & (b > 0)).double().mean() - 0.49) < 4 * error
    centered = (found[0] > 0).double() - 0.7  # neighbours in rows and in units
    for a, b in (
        (centered[1:], centered[:-1]),
        (centered[:, 1:], centered[:, :-1]),
        (centered[:, 4:], centered[:, :-4]),
    ):
        assert abs((a * b).mean()) < 4 * 0.21 / b.numel() ** 0.5


def test_a_row_drops_the_same_in_every_batch_width_and_precision() -> None:
    drop = Dropout(0.5, torch.tensor([3]), 2)
    whole = drop(torch.ones(9, 13, dtype=torch.float64), 1)
    assert torch.equal(drop(torch.ones(4, 13), 1), whole[:4].float())
    assert torch.equal(drop(torch.ones(9, 6, dtype=torch.float64), 1), whole[:, :6])


def test_a_probability_close_to_one_drops_everything() -> None:
    assert not Dropout(1 - 2**-50, torch.tensor(0), 0)(torch.ones(100, 100), 0).any()
