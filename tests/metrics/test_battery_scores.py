"""Scores of the battery against closed forms, against their definitions, and against other implementations where installed."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glf_fast.errors import UserError
from glf_fast.metrics import (
    FeatureStats,
    critic_distance,
    density_coverage,
    diversity,
    inception_score,
    mode_counts,
    ms_ssim,
    nearest,
    neighbours,
    prd,
    precision_recall,
    proximity,
)
from glf_fast.metrics.estimates import GROUPS, T_QUANTILE, jackknife
from glf_fast.metrics.ms_ssim import scales
from glf_fast.metrics.prd import prd_curve


def seen(x: Tensor) -> FeatureStats:
    stats = FeatureStats(x.shape[1], keep=10**6)
    stats.update(x)
    return stats


def draws(n: int, seed: int, dim: int = 4) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# -- intervals ------------------------------------------------------------------------------------------------------------


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = draws(2000, 0, 1)[:, 0].double()
    without = torch.stack([x[torch.arange(2000) % GROUPS != g].mean() for g in range(GROUPS)])
    low, high = jackknife(0.0, without).interval
    groups = x.view(-1, GROUPS).mean(0)
    assert high == pytest.approx(T_QUANTILE * float(groups.std()) / GROUPS**0.5, rel=1e-9) and low == -high
    assert jackknife(0.0, without, low=0).interval[0] == 0
    assert jackknife(0.0, torch.full((GROUPS,), torch.nan)).interval is None


# -- Inception score ------------------------------------------------------------------------------------------------------

IS = {
    "every class once, certain": (1000 * torch.eye(7).repeat(20, 1), 7.0),
    "one class": (1000 * torch.eye(7)[:1].repeat(140, 1), 1.0),
    "no idea": (torch.zeros(140, 7), 1.0),
    # Half of the images surely of class 0, half without an idea of two: KL = log(4/3) and (log(2/3) + log 2)/2.
    "half certain": (
        torch.tensor([[1000.0, 0.0], [0.0, 0.0]]).repeat(70, 1),
        math.exp((math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2),
    ),
}


@pytest.mark.parametrize("case", IS)
def test_inception_scores_in_closed_form(case: str) -> None:
    logits, expected = IS[case]
    found = inception_score(logits)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.interval[1] - found.interval[0] < 0.5
    few = inception_score(logits[:2])
    assert few.interval is None and few.value + 1e-9 >= 1
    assert inception_score(logits[:1]).value == pytest.approx(1)


def test_inception_score_is_the_published_code_and_its_interval_that_of_the_definition() -> None:
    logits = 3 * draws(1307, 0, 10)  # two chunks, and groups of unequal size
    found = inception_score(logits)

    def definition(logits: Tensor) -> float:
        p = logits.double().softmax(1).numpy()
        return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))

    assert found.value == pytest.approx(definition(logits), rel=1e-12)
    groups = torch.arange(1307) % GROUPS
    without = torch.tensor([definition(logits[groups != g]) for g in range(GROUPS)], dtype=torch.float64)
    assert found.interval == pytest.approx(jackknife(found.value, without, 1, 10).interval, rel=1e-9)
    assert inception_score(logits.flip(0)).value == pytest.approx(found.value, rel=1e-12)


def test_inception_score_of_torch_fidelity() -> None:
    """Version 0.4.0: isc_features_to_metric(logits, splits=1, shuffle=False)."""
    logits = 3 * torch.sin(1.3 * torch.arange(60.0)[:, None] + 2.1 * torch.arange(5.0))
    assert inception_score(logits).value == pytest.approx(2.1046664481498425, rel=1e-6)
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    published = fidelity.isc_features_to_metric(logits, splits=1, shuffle=False)
    assert inception_score(logits).value == pytest.approx(published["inception_score_mean"], rel=1e-6)


# -- modes ----------------------------------------------------------------------------------------------------------------


def test_mode_counts_in_closed_form() -> None:
    samples, real = torch.arange(100) % 4, torch.arange(400) % 8
    found = mode_counts(samples, real, 10)
    assert (found.hit.value, found.modes) == (4, 10)
    assert found.kl_uniform.value == pytest.approx(math.log(10 / 4))
    assert found.kl_reference.value == pytest.approx(math.log((1 / 4) / (51 / 410)))
    same = mode_counts(real.flip(0), real, 8)
    assert same.hit.value == 8 and same.kl_uniform.value == same.kl_reference.value == pytest.approx(0, abs=1e-12)
    absent = mode_counts(torch.full((50,), 9), real, 10)  # a mode that no real image has: finite
    assert absent.kl_reference.value == pytest.approx(math.log(410)) and absent.hit.value == 1
    assert mode_counts(torch.tensor([3]), real, 10).hit == (1, None)
    assert found.hit.interval is None and found.kl_uniform.interval is not None
    for pair in ((samples, real), (real, samples)):
        with pytest.raises(ValueError, match=r"modes must be in 0 … 5; got 7"):
            mode_counts(*pair, 6)


# -- PRD ------------------------------------------------------------------------------------------------------------------


def test_prd_curve_is_the_authors_formula() -> None:
    q, p = torch.tensor([0.5, 0.3, 0.2, 0.0]).double(), torch.tensor([0.1, 0.3, 0.2, 0.4]).double()
    precision, recall = prd_curve(q, p)
    slopes = np.tan(np.linspace(1e-10, np.pi / 2 - 1e-10, 1001))
    expected = np.minimum(p.numpy()[None] * slopes[:, None], q.numpy()[None]).sum(1)
    np.testing.assert_allclose(precision, np.clip(expected, 0, 1), rtol=1e-6)
    np.testing.assert_allclose(recall, np.clip(expected / slopes, 0, 1), rtol=1e-6)
    # Precision is at most the real share of samples (all), recall at most the share of real images that samples cover.
    assert float(precision.max()) == pytest.approx(1) and float(recall.max()) == pytest.approx(0.6)
    exchanged = prd_curve(p, q)
    torch.testing.assert_close(exchanged[0], recall.flip(0), rtol=1e-5, atol=1e-9)


def far_apart(kinds: list[int], n: int = 300) -> Tensor:
    """Features in tight groups that are far from each other, equally many of each of these kinds."""
    centres = 100 * torch.eye(16)
    return centres[torch.tensor(kinds).repeat(n)[:n]] + 0.1 * draws(n, sum(kinds), 16)


@pytest.mark.parametrize(
    ("samples", "real", "recall", "precision"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], (0.9, 1), (0.9, 1)),
        ([0, 1], [0, 1, 2, 3], (0.4, 0.6), (0.9, 1)),  # half is missing
        ([0, 1, 2, 3], [0, 1], (0.9, 1), (0.4, 0.6)),  # half is wrong
        ([0, 1], [2, 3], (0, 1e-6), (0, 1e-6)),
    ],
)
def test_f8_is_recall_and_f1_8_precision(samples, real, recall, precision) -> None:
    found = prd(seen(far_apart(samples)), seen(far_apart(real).flip(0)))
    assert recall[0] <= found.f8.value <= recall[1] and precision[0] <= found.f1_8.value <= precision[1]
    for estimate in (found.f8, found.f1_8):
        assert 0 <= estimate.interval[0] <= estimate.value <= estimate.interval[1] <= 1
    again = prd(seen(far_apart(samples)), seen(far_apart(real).flip(0)))
    assert again.f8 == found.f8 and again.f1_8 == found.f1_8


def test_prd_of_identical_sets_and_of_equal_features() -> None:
    x = draws(200, 0)
    same = prd(seen(x), seen(x.flip(0)))
    assert same.f8.value == same.f1_8.value == pytest.approx(1, abs=1e-9)
    equal = prd(seen(torch.ones(30, 3)), seen(torch.ones(30, 3)))
    assert equal.f8 == (pytest.approx(1), None)  # too few for an interval


# -- density and coverage -------------------------------------------------------------------------------------------------


def naive_dc(fake: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    """Equations 3 and 4 of arXiv:2002.09797, from all differences."""

    def squared(a: Tensor, b: Tensor) -> np.ndarray:
        return np.square(a.double().numpy()[:, None] - b.double().numpy()[None]).sum(2)

    radii = np.sort(squared(real, real) + np.diag(np.full(len(real), np.inf)), 1)[:, k - 1]
    hits = squared(fake, real) <= radii
    return float(hits.sum() / (k * len(fake))), float(hits.any(0).mean())


LINE = torch.arange(8.0)[:, None]
DC: dict[str, tuple[Tensor, Tensor, int]] = {
    "draws": (1.2 * draws(50, 0) + 0.3, draws(50, 1), 5),
    "far from the origin": (draws(45, 0) + 1000, draws(45, 1) + 1000, 3),
    "ties: points on the surfaces of balls": (LINE + 1, LINE, 2),
    "radius 0": (draws(8, 0).repeat(4, 1), draws(8, 0).repeat(4, 1), 3),
    "collapsed": (draws(1, 0).expand(30, -1), draws(30, 0), 5),
}


@pytest.mark.parametrize("case", DC)
def test_density_and_coverage_equal_the_definition(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    fake, real, k = DC[case]
    found = density_coverage(seen(fake), seen(real), k)
    assert (found.density.value, found.coverage.value) == pytest.approx(naive_dc(fake, real, k), rel=1e-12)
    if len(fake) >= 2 * GROUPS:
        groups = torch.arange(len(fake)) % GROUPS
        spread = [naive_dc(fake[groups != g], real, k) for g in range(GROUPS)]
        for estimate, without in zip((found.density, found.coverage), zip(*spread, strict=True), strict=True):
            expected = jackknife(
                estimate.value,
                torch.tensor(without, dtype=torch.float64),
                0,
                1 if estimate is found.coverage else math.inf,
            )
            assert estimate.interval == pytest.approx(expected.interval, abs=1e-9)


def test_density_and_coverage_of_one_distribution_and_of_one_set() -> None:
    n, k = 400, 5
    found = density_coverage(seen(draws(n, 0, 8)), seen(draws(n, 1, 8)))
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert found.coverage.value == pytest.approx(expected, abs=0.03) and found.density.value == pytest.approx(
        1, abs=0.1
    )
    same = density_coverage(seen(draws(n, 0)), seen(draws(n, 0).flip(0)))
    assert same.coverage.value == 1 and same.density.value == pytest.approx(1 + 1 / k)  # a ball's centre is in it, too


def test_the_four_scores_of_prdc() -> None:
    """Version 0.2 of the package prdc."""
    i, j = torch.arange(60, dtype=torch.float64)[:, None], torch.arange(1, 4)
    real, fake = torch.sin(0.37 * i * i * j + j), 1.2 * torch.sin(0.53 * i * i * j + 2 * j) + 0.4
    published = {"precision": 0.45, "recall": 52 / 60, "density": 0.34, "coverage": 0.45}
    found = density_coverage(seen(fake), seen(real))
    balls = precision_recall(seen(fake), seen(real), k=5)
    values = {"precision": balls.precision, "recall": balls.recall}
    values |= {"density": found.density.value, "coverage": found.coverage.value}
    assert values == pytest.approx(published, rel=1e-9)
    prdc = pytest.importorskip("prdc")
    again = prdc.compute_prdc(real_features=real.numpy(), fake_features=fake.numpy(), nearest_k=5)
    assert values == pytest.approx(again, rel=1e-9)


# -- MS-SSIM --------------------------------------------------------------------------------------------------------------


def test_ms_ssim_in_closed_form() -> None:
    x = pixels(3, 3, 40, 32).double() / 255
    torch.testing.assert_close(ms_ssim(x, x), torch.ones(3, dtype=torch.float64))
    a, b = (torch.full((1, 1, 28, 28), level, dtype=torch.float64) for level in (0.2, 0.7))
    luminance = (2 * 0.2 * 0.7 + 1e-4) / (
        0.2**2 + 0.7**2 + 1e-4
    )  # of flat images only luminance differs, at the last scale
    weight = 0.2856 / (0.0448 + 0.2856)
    assert float(ms_ssim(a, b)) == pytest.approx(luminance**weight, rel=1e-9)
    assert float(ms_ssim(x[:1], 1 - x[:1])) == 0  # negative structure
    assert [scales(side, side) for side in (8, 11, 21, 22, 28, 32, 44, 64, 88, 176, 512)] == [
        1,
        1,
        1,
        2,
        2,
        2,
        3,
        3,
        4,
        5,
        5,
    ]
    assert float(ms_ssim(x[:, :, :8, :8], x[:, :, :8, :8]).min()) == pytest.approx(1)


def test_one_window_has_the_ssim_of_the_definition() -> None:
    """An image of 11 pixels holds one window: the moments are weighted sums over all pixels."""
    a, b = (pixels(1, 1, 11, 11, seed=seed).double() / 255 for seed in (0, 1))
    b = 0.5 * a + 0.5 * b
    offsets = np.arange(11) - 5.0
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    x, y = a[0, 0].numpy(), b[0, 0].numpy()
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy, cov = (
        (weights * (x - mx) ** 2).sum(),
        (weights * (y - my) ** 2).sum(),
        (weights * (x - mx) * (y - my)).sum(),
    )
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert float(ms_ssim(a, b)) == pytest.approx(expected, rel=1e-9)


def test_diversity_tells_copies_from_different_images() -> None:
    different, same = pixels(80, 1, 16, 16), pixels(1, 1, 16, 16).expand(80, -1, -1, -1)
    assert diversity(same).value == pytest.approx(0, abs=1e-9)
    found = diversity(different)
    assert found.value > 0.8 and found.interval[0] < found.value < found.interval[1]
    pairs = [1 - ms_ssim(a[None].double() / 255, b[None].double() / 255) for a, b in different.view(40, 2, 1, 16, 16)]
    assert found.value == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-6)
    with pytest.raises(ValueError, match="at least two images, got 1"):
        diversity(different[:1])


# -- the critic -----------------------------------------------------------------------------------------------------------


def test_the_critic_has_its_floor_and_orders_blur_before_noise(blobs: Callable[..., Tensor]) -> None:
    train, test = (255 * (blobs(300, seed)[:, :, ::3, ::3] > 50).to(torch.uint8) for seed in (0, 1))  # discs
    blurred = torch.nn.functional.avg_pool2d(train.float(), 3, 1, 1).to(torch.uint8)
    noise = pixels(*train.shape)
    floor, blur, worst = (critic_distance(images, test, steps=30) for images in (train, blurred, noise))
    assert floor.interval[0] < 0 < floor.interval[1]
    assert floor.interval[1] < blur.interval[0] and blur.interval[1] < worst.interval[0]
    again = [critic_distance(blurred, test, steps=2) for _ in range(2)]
    assert again[0] == again[1] != critic_distance(blurred, test, steps=2, seed=1)
    with pytest.raises(UserError, match="images of one shape"):
        critic_distance(train[:, :, 1:], test)
    with pytest.raises(ValueError, match="at least four images of either set; got 3 and 300"):
        critic_distance(train[:3], test)


# -- nearest training images ----------------------------------------------------------------------------------------------


def test_nearest_training_images_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    x, training = draws(40, 0), draws(90, 1)
    squared, index = (x[:, None] - training).double().square().sum(2).min(1)
    for size in (90, 37, 1):
        found = nearest(x, training.split(size))
        assert torch.equal(found.number, index)
        torch.testing.assert_close(found.squared, squared, rtol=1e-6, atol=1e-9)
    tied = nearest(training[:5], [training, training])  # of equally near ones the first
    assert tied.number.tolist() == [0, 1, 2, 3, 4] and float(tied.squared.max()) < 1e-12
    with pytest.raises(UserError, match="NaN or infinity"):
        nearest(x, [training * torch.nan])


def test_copies_are_found() -> None:
    training, test = draws(500, 0), draws(200, 1)
    copies, fresh = training[:200] + 1e-3 * draws(200, 3), draws(200, 2)

    def compared(samples: Tensor) -> Any:
        return proximity(*(nearest(x, [training]).squared.sqrt() for x in (samples, test)))

    assert compared(copies).closer.value > 0.99 and compared(copies).median.value < 0.02
    assert compared(fresh).closer.interval[0] < 0.5 < compared(fresh).closer.interval[1]
    assert compared(fresh).median.value == pytest.approx(1, abs=0.2)
    itself = proximity(torch.ones(50), torch.ones(60))  # all are ties
    assert itself.closer.value == 0.5 and itself.median.value == 1


# -- what they need -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inception_score(torch.zeros(0, 10)), "at least one image"),
        (
            lambda: mode_counts(torch.zeros(0, dtype=torch.long), torch.zeros(3, dtype=torch.long), 10),
            "at least one image",
        ),
        (lambda: prd(seen(draws(19, 0)), seen(draws(50, 1))), "at least 20 kept features on each side, got 19"),
        (lambda: density_coverage(seen(draws(5, 0)), seen(draws(50, 1))), "more than k kept features.* got 5 and k=5"),
        (lambda: proximity(torch.zeros(0), torch.ones(3)), "at least one image"),
        (lambda: prd(seen(draws(50, 0, 3)), seen(draws(50, 1, 4))), "different lengths"),
        (lambda: seen(torch.tensor([[0.0, torch.nan]])), "features contain NaN or infinity"),
    ],
)
def test_what_cannot_be_computed_is_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
