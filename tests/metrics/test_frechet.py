import types

import numpy as np
import pytest
import scipy.linalg
import torch

from glf_fast.errors import UserError
from glf_fast.metrics import FeatureStats, frechet_distance, jackknife_interval, linalg
from glf_fast.metrics.estimates import GROUPS, T_QUANTILE


def gaussian(mean: list[float], cov: list[list[float]]) -> FeatureStats:
    return FeatureStats.from_moments(*(torch.tensor(part, dtype=torch.float64) for part in (mean, cov)), n=1000)


def seen(x: torch.Tensor, **options: object) -> FeatureStats:
    stats = FeatureStats(x.shape[1], **options)
    stats.update(x)
    return stats


def draws(n: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Correlated, non-negative features, like those behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    return (scale * torch.randn(n, dim, generator=generator) @ mix + shift).relu()


def scipy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    s1, s2 = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real))


def test_closed_forms() -> None:
    # One dimension: (μ₁−μ₂)² + (σ₁−σ₂)².
    assert frechet_distance(gaussian([1.0], [[4.0]]), gaussian([-2.0], [[25.0]])) == pytest.approx(9 + 9, rel=1e-12)
    # Commuting covariances: the same, summed over their axes.
    a, b = gaussian([0.0, 0.0], [[4.0, 0.0], [0.0, 9.0]]), gaussian([3.0, 4.0], [[1.0, 0.0], [0.0, 16.0]])
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 1, rel=1e-12)
    # Two general 2×2 covariances: tr √(AB) = √(tr AB + 2·√(det A·det B)).
    a, b = gaussian([0.0, 0.0], [[2.0, 1.0], [1.0, 3.0]]), gaussian([0.0, 0.0], [[5.0, -2.0], [-2.0, 1.0]])
    trace, det = 2 * 5 - 2 - 2 + 3 * 1, (2 * 3 - 1) * (5 - 4)
    assert frechet_distance(a, b) == pytest.approx(5 + 6 - 2 * (trace + 2 * det**0.5) ** 0.5, rel=1e-12)
    # A distribution from itself, and a singular one from another.
    assert frechet_distance(b, b) == pytest.approx(0, abs=1e-12)
    flat = gaussian([0.0, 0.0], [[1.0, 1.0], [1.0, 1.0]])
    assert frechet_distance(flat, gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(
        4 - 2 * 2**0.5, rel=1e-7
    )


@pytest.mark.parametrize(("n", "dim"), [(300, 1), (400, 17), (2000, 128)])
def test_agrees_with_scipy(n: int, dim: int) -> None:
    x, y = draws(n, dim, 0), draws(n + 50, dim, 1, scale=1.3, shift=0.1)
    expected = scipy_distance(x, y)
    for keep in (0, 5000):
        assert frechet_distance(seen(x, keep=keep), seen(y, keep=keep)) == pytest.approx(expected, rel=1e-6)
        assert frechet_distance(seen(y, keep=keep), seen(x, keep=keep)) == pytest.approx(expected, rel=1e-6)


def test_few_samples_take_the_exact_path() -> None:
    """With fewer features than dimensions a pure shift is exact; eigenvalues of the covariance would add noise."""
    x = draws(40, 200, 0).double()
    shift = 0.01
    moved = x + shift
    exact = frechet_distance(seen(moved, keep=40), seen(x, keep=40))
    through_covariances = frechet_distance(seen(moved), seen(x))
    assert exact == pytest.approx(200 * shift**2, rel=1e-4)  # features are kept in float32
    assert abs(through_covariances - 200 * shift**2) < 1e-3 * float(seen(x).cov.trace())


@pytest.mark.parametrize(("few", "many"), [(40, 60), (40, 1000), (1000, 40)])
def test_exact_path_equals_the_nuclear_norm(few: int, many: int) -> None:
    x, y = draws(few, 100, 0), draws(many, 100, 1, scale=1.2)
    a, b = (v.double().numpy() - v.double().numpy().mean(0) for v in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum() / ((few - 1) * (many - 1)) ** 0.5
    traces = (a**2).sum() / (few - 1) + (b**2).sum() / (many - 1)
    expected = float(((x.double().mean(0) - y.double().mean(0)) ** 2).sum() + traces - 2 * cross)
    assert frechet_distance(seen(x, keep=few), seen(y, keep=many)) == pytest.approx(expected, rel=1e-6)


def test_only_comparable_statistics() -> None:
    a = seen(draws(50, 4, 0), extractor={"name": "tiny"})
    with pytest.raises(UserError, match=r"different extractors.*'tiny' and 'vgg16'"):
        frechet_distance(a, seen(draws(50, 4, 0), extractor={"name": "vgg16"}))
    with pytest.raises(UserError, match="at least two"):
        frechet_distance(a, seen(draws(1, 4, 0)))


def test_a_distance_that_is_no_number_is_an_error_not_a_perfect_score() -> None:
    far, near = gaussian([1e200], [[1.0]]), gaussian([0.0], [[1.0]])
    with pytest.raises(UserError, match="the Fréchet distance is inf"):
        frechet_distance(far, near)
    near._mean[0] = float("nan")
    with pytest.raises(UserError, match="the Fréchet distance is nan"):
        frechet_distance(near, gaussian([0.0], [[1.0]]))


@pytest.mark.parametrize(("n", "dim"), [(410, 6), (60, 100)])
def test_jackknife_equals_leaving_groups_out_by_hand(n: int, dim: int) -> None:
    x, reference = draws(n, dim, 0), seen(draws(500, dim, 1, scale=1.2), keep=500)
    rows = torch.arange(n)
    left = torch.tensor(
        [frechet_distance(seen(x[rows % GROUPS != g], keep=n), reference) for g in range(GROUPS)], dtype=torch.float64
    )
    error = float(left.std(correction=0)) * (GROUPS - 1) ** 0.5
    value = frechet_distance(seen(x, keep=n), reference)
    low, high = jackknife_interval(seen(x, keep=n), reference)
    assert high == pytest.approx(value + T_QUANTILE * error, rel=1e-9)
    assert low == pytest.approx(max(0.0, value - T_QUANTILE * error), rel=1e-9)


def test_jackknife_interval_has_the_width_of_repeated_draws() -> None:
    reference = seen(draws(5000, 8, 0))
    samples = [seen(draws(500, 8, seed, scale=1.3), keep=500) for seed in range(1, 101)]
    spread = torch.tensor([frechet_distance(s, reference) for s in samples]).std()
    halves = [(high - low) / 2 / T_QUANTILE for low, high in (jackknife_interval(s, reference) for s in samples[:20])]
    assert 0.75 < float(torch.tensor(halves).mean() / spread) < 1.35


def test_jackknife_needs_all_samples() -> None:
    reference = seen(draws(100, 4, 0))
    for n, keep in ((39, 39), (100, 99)):
        with pytest.raises(ValueError, match="at least 40 samples with all features kept"):
            jackknife_interval(seen(draws(n, 4, 1), keep=keep), reference)


def test_a_failing_device_solver_falls_back_to_the_cpu() -> None:
    """The CPU takes over; a tensor on a device whose solver fails stands for a GPU."""
    matrix = torch.eye(3)
    elsewhere = types.SimpleNamespace(device=torch.device("meta"), cpu=lambda: matrix)

    def solve(m: object) -> tuple[torch.Tensor, ...]:
        if m is elsewhere:
            raise RuntimeError("CUSOLVER_STATUS_INTERNAL_ERROR")
        assert m is matrix
        return (torch.linalg.eigvalsh(matrix),)

    assert linalg._solve_with_fallback(solve, elsewhere)[0].shape == (3,)
    with pytest.raises(RuntimeError):
        linalg.eigvalsh(torch.full((2, 3), 1.0))
