import numpy as np
import pytest
import torch

from glf_fast.metrics import FeatureStats, kid


def seen(x: torch.Tensor, keep: int = 10**6, **options: object) -> FeatureStats:
    stats = FeatureStats(x.shape[1], keep=keep, **options)
    stats.update(x)
    return stats


def draws(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) + shift


def test_equals_the_definition() -> None:
    x, y = draws(8, 0), draws(8, 1, shift=0.5)
    result = kid(seen(x), seen(y), block=4)
    assert (result.blocks, result.block) == (4, 2)  # too few features for ten blocks of four

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    values = []
    for start in range(0, 8, 2):
        a, b = x[start : start + 2].double().numpy(), y[start : start + 2].double().numpy()
        cross = sum(kernel(p, q) for p in a for q in b) / 4
        values.append(kernel(a[0], a[1]) + kernel(b[0], b[1]) - 2 * cross)
    assert result.mean == pytest.approx(np.mean(values), rel=1e-10)
    assert result.std == pytest.approx(np.std(values, ddof=1), rel=1e-10)


def test_is_unbiased_and_sees_differences() -> None:
    """For one distribution the mean of the blocks is zero within its error, whatever the size of the blocks."""
    a, b, moved = draws(20_000, 0), draws(20_000, 1), draws(20_000, 2, shift=0.3)
    for block in (20, 1000):
        same = kid(seen(a), seen(b), block)
        assert abs(same.mean) < 3 * same.std / same.blocks**0.5
        assert (same.blocks, same.block) == (20_000 // block, block)
    different = kid(seen(a), seen(moved))
    assert different.mean > 20 * different.std / different.blocks**0.5


def test_blocks_use_each_feature_once() -> None:
    result = kid(seen(draws(2500, 0)), seen(draws(3000, 1)), block=1000)
    assert (result.blocks, result.block) == (10, 250)


def test_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"at least four kept features on each side.*got 3"):
        kid(seen(draws(100, 0)), seen(draws(100, 1), keep=3))
    with pytest.raises(ValueError, match="different extractors"):
        kid(seen(draws(9, 0), extractor={"name": "a"}), seen(draws(9, 0), extractor={"name": "b"}))
