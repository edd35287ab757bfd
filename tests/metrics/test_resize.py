import pytest
import torch
from torch.nn import functional as F

from glf_fast.metrics.resize import antialiased, tf1_bilinear


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        # Twice as wide: positions 0, ½, 1, 1½; the last one lies between the last pixel and its repetition.
        ([0.0, 8.0], [0.0, 4.0, 8.0, 8.0]),
        # Three to two: positions 0 and 1½.
        ([0.0, 10.0, 30.0], [0.0, 20.0]),
        # Four to two: every second pixel, no averaging.
        ([1.0, 7.0, 3.0, 9.0], [1.0, 3.0]),
        # Two to three: positions 0, ⅔, 4⁄3.
        ([3.0, 9.0], [3.0, 7.0, 9.0]),
        # Five to four: positions 0, 1¼, 2½, 3¾.
        ([0.0, 4.0, 8.0, 16.0, 0.0], [0.0, 5.0, 12.0, 4.0]),
        # Same size: unchanged.
        ([5.0, 1.0, 250.0], [5.0, 1.0, 250.0]),
        # One pixel repeats.
        ([6.0], [6.0, 6.0, 6.0]),
    ],
)
def test_rule_of_tensorflow_1_worked_out_by_hand(pixels: list[float], expected: list[float]) -> None:
    row = torch.tensor(pixels).view(1, 1, 1, -1)
    wanted = torch.tensor(expected).view(1, 1, 1, -1)
    torch.testing.assert_close(tf1_bilinear(row, 1, len(expected)), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(tf1_bilinear(row.mT, len(expected), 1), wanted.mT, rtol=1e-6, atol=1e-5)


def test_two_axes_by_hand() -> None:
    image = torch.tensor([[0.0, 8.0], [16.0, 40.0]]).expand(2, 3, 2, 2)
    expected = torch.tensor(
        [[0.0, 4.0, 8.0, 8.0], [8.0, 16.0, 24.0, 24.0], [16.0, 28.0, 40.0, 40.0], [16.0, 28.0, 40.0, 40.0]]
    )
    assert torch.equal(tf1_bilinear(image, 4, 4), expected.expand(2, 3, 4, 4))


def test_it_is_none_of_torchs_rules() -> None:
    x = torch.rand(1, 3, 32, 28, generator=torch.Generator().manual_seed(0)) * 255
    y = tf1_bilinear(x, 299, 299)
    assert y.shape == (1, 3, 299, 299)
    for align in (False, True):
        assert (y - F.interpolate(x, (299, 299), mode="bilinear", align_corners=align)).abs().mean() > 0.5


def test_antialiased_averages_and_leaves_the_right_size_alone() -> None:
    x = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert antialiased(x, 28, 28) is x
    checkerboard = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float().expand(1, 1, 64, 64)
    inner = antialiased(checkerboard, 16, 16)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), rtol=0, atol=0.02)
