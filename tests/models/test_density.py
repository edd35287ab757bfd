"""Densities of codes: mixtures against scikit-learn and closed forms, flows, and codes that have no density."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from glf_fast.errors import UserError
from glf_fast.models import mixture
from glf_fast.models.density import Density, DensitySettings
from glf_fast.models.mixture import fit_mixture, least_variance


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=seeded(seed))


def build(kind: str, dim: int, **settings: object) -> Density:
    torch.manual_seed(0)
    density = DensitySettings(kind=kind, **settings).build(dim)
    assert density is not None
    return density


# Three normal distributions in the plane.
KNOWN = MixtureSameFamily(
    Categorical(torch.tensor([0.5, 0.3, 0.2])),
    MultivariateNormal(
        torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 5.0]]),
        scale_tril=torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.3, 0.0], [0.0, 2.0]], [[1.0, 0.0], [-0.9, 0.2]]]),
    ),
)


def banana(n: int, seed: int = 0) -> Tensor:
    z = normal(n, 2, seed)
    return torch.stack([2 * z[:, 0], z[:, 1] * 0.3 + z[:, 0].square()], 1)


@pytest.mark.parametrize(("dim", "components", "unit"), [(2, 3, 1.0), (5, 4, 1.0), (5, 4, 1e-4), (8, 1, 30.0)])
def test_mixtures_have_the_numbers_of_scikit_learn(
    dim: int, components: int, unit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    centres = 3 * normal(components, dim, 1)
    x = unit * (normal(1500, dim) + centres[torch.arange(1500) % components]).double()
    guess = unit * (centres + 3 * normal(components, dim, 2)).double()
    start = (-torch.cdist(x, guess).square() / (20 * unit**2)).softmax(1)
    reference = GaussianMixture(components, reg_covar=least_variance(x), tol=1e-3, max_iter=2000)
    monkeypatch.setattr(
        reference,
        "_initialize_parameters",
        lambda X, random_state, xp=np: reference._initialize(X, start.numpy(), xp=xp),
    )
    reference.fit(x.numpy())
    found = fit_mixture(x, components, start=start)
    assert found.iterations == reference.n_iter_ and (components == 1 or found.iterations > 5)
    covariances = found.factors @ found.factors.mT
    for ours, theirs, scale in (
        (found.weights, reference.weights_, 1.0),
        (found.means, reference.means_, unit),
        (covariances, reference.covariances_, unit**2),
    ):
        torch.testing.assert_close(ours / scale, torch.as_tensor(theirs) / scale, atol=1e-6, rtol=1e-6)
    assert found.log_likelihood == pytest.approx(reference.lower_bound_, rel=1e-6)


def test_known_mixtures_are_found_from_the_clusters() -> None:
    torch.manual_seed(0)
    codes = KNOWN.sample((20_000,))
    density = build("mixture", 2, components=3)
    density.fit(codes)
    order = density.weights.argsort(descending=True)
    torch.testing.assert_close(density.weights[order], KNOWN.mixture_distribution.probs, atol=0.02, rtol=0)
    torch.testing.assert_close(density.means[order], KNOWN.component_distribution.loc, atol=0.1, rtol=0)
    factors = density.factors[order]
    torch.testing.assert_close(factors, KNOWN.component_distribution.scale_tril, atol=0.06, rtol=0)
    # The entropy, and samples of the density fitted to the codes.
    own = MixtureSameFamily(Categorical(density.weights), MultivariateNormal(density.means, scale_tril=density.factors))
    torch.testing.assert_close(density.log_prob(codes), own.log_prob(codes), atol=1e-4, rtol=1e-5)
    drawn = density.sample(20_000, generator=seeded(3))
    assert KNOWN.log_prob(drawn).mean().item() == pytest.approx(KNOWN.log_prob(codes).mean().item(), abs=0.05)
    shares = (drawn[:, None] - density.means).norm(dim=2).argmin(1).bincount() / len(drawn)
    nearest = (codes[:, None] - density.means).norm(dim=2).argmin(1).bincount() / len(codes)
    torch.testing.assert_close(shares, nearest, atol=0.02, rtol=0)


def test_a_gaussian_is_the_closed_form() -> None:
    codes = normal(3000, 3) @ torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.5, 0.0], [0.1, 0.2, 3.0]]) + 5
    density = build("gaussian", 3)
    torch.testing.assert_close(density.log_prob(codes), -0.5 * (codes.square().sum(1) + 3 * math.log(2 * math.pi)))
    density.fit(codes)
    wanted = MultivariateNormal(codes.mean(0), codes.mT.cov(correction=0))
    torch.testing.assert_close(density.log_prob(codes), wanted.log_prob(codes), atol=1e-3, rtol=1e-5)
    drawn = density.sample(100_000, generator=seeded(1))
    torch.testing.assert_close(drawn.mean(0), codes.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.mT.cov(), codes.mT.cov(), atol=0.2, rtol=0)
    cold = density.sample(100_000, generator=seeded(1), temperature=0.5)
    torch.testing.assert_close(cold - codes.mean(0), 0.5 * (drawn - codes.mean(0)), atol=1e-4, rtol=1e-4)


def test_a_flow_is_normalised_and_better_than_a_gaussian_on_a_banana() -> None:
    flow, gaussian = build("flow", 2, steps=4, hidden=(32,), epochs=15), build("gaussian", 2)
    for density in (flow, gaussian):
        density.fit(banana(4000))
    fresh = banana(4000, seed=9)
    # The entropy of a banana is that of its two normal numbers, plus log 2 + log 0.3 of the scales.
    entropy = math.log(2 * math.pi * math.e) + math.log(0.6)
    values = [density.log_prob(fresh).mean().item() for density in (flow, gaussian)]
    assert values[1] + 0.5 < values[0] < 0.1 - entropy
    axes = torch.linspace(-16, 16, 801), torch.linspace(-8, 32, 1001)
    for density in (flow, gaussian):
        logs = density.log_prob(torch.cartesian_prod(*axes)).double()
        shares = logs.exp() * (32 / 800) * (40 / 1000)
        assert shares.sum().item() == pytest.approx(1, abs=0.01)
        drawn = density.log_prob(density.sample(20_000, generator=seeded(5)))
        assert drawn.mean().item() == pytest.approx((shares * logs).sum().item(), abs=0.05)
    assert not any(parameter.requires_grad for parameter in flow.parameters())


KINDS = [("gaussian", {}), ("mixture", {"components": 5}), ("flow", {"steps": 2, "hidden": (16,), "epochs": 3})]
Spoil = Callable[[Tensor], Tensor]
ODD: dict[str, Spoil] = {
    "a constant": lambda z: torch.cat([z[:, :3], torch.full_like(z[:, :1], 3.7)], 1),
    "a copy": lambda z: torch.cat([z[:, :3], 2 * z[:, :1] - 1], 1),
    "all constant": lambda z: torch.full_like(z, 3.7),
    "all zero": torch.zeros_like,
    "two values": lambda z: torch.sign(z[:, :1]).expand(-1, 4),
    "tiny": lambda z: 1e-9 * z,
    "far away": lambda z: z + 1000,
    "few": lambda z: z[:3],
    "two": lambda z: z[:2],
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_codes_without_a_density_are_fitted_and_drawn(kind: str, settings: dict, odd: str) -> None:
    codes = ODD[odd](normal(600, 4))
    density = build(kind, 4, **settings)
    with torch.no_grad():
        density.fit(codes)
    drawn = density.sample(1000, generator=seeded(1))
    assert drawn.isfinite().all() and density.log_prob(codes).isfinite().all()
    if odd in ("few", "two"):
        return
    # Directions without variance get a thousandth of the others' deviation.
    typical = codes.std(0).square().mean().sqrt().item()
    rounding = 1e-6 * codes.abs().max().item()
    torch.testing.assert_close(drawn.mean(0), codes.mean(0), atol=0.3 * typical + rounding + 1e-18, rtol=0)
    for column, wanted in zip(drawn.std(0).tolist(), codes.std(0).tolist(), strict=True):
        assert column == pytest.approx(wanted, abs=0.3 * typical + rounding + 1e-18)
    if odd == "a constant":
        assert 0.0001 < drawn[:, 3].std() / typical < 0.01
    if odd == "a copy":
        assert (drawn[:, 3] - 2 * drawn[:, 0] + 1).std() < 0.02 * typical


def test_fits_do_not_depend_on_the_unit_of_codes() -> None:
    torch.manual_seed(0)
    codes = KNOWN.sample((2000,)).double()
    one, other = (fit_mixture(unit * codes, 3) for unit in (1.0, 2.0**-20))
    torch.testing.assert_close(one.means, 2.0**20 * other.means, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.factors, 2.0**20 * other.factors, rtol=1e-9, atol=1e-9)


def test_a_fit_is_the_same_every_time_and_leaves_the_random_numbers_alone() -> None:
    for kind, settings in KINDS:
        fits = []
        for seed in (1, 2):
            density = build(kind, 2, **settings)
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            density.fit(banana(600))
            assert torch.equal(before, torch.get_rng_state())
            fits.append(density.state_dict())
        assert all(torch.equal(value, fits[1][name]) for name, value in fits[0].items()), kind


def test_large_sets_of_codes_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_mixture(banana(1000), 3)
    monkeypatch.setattr(mixture, "_ROWS", 64)
    parts = fit_mixture(banana(1000), 3)
    torch.testing.assert_close(whole.means, parts.means, rtol=1e-9, atol=1e-9)


def test_codes_that_are_not_finite_are_named() -> None:
    for value in (math.nan, math.inf):
        codes = normal(10, 2)
        codes[3, 1] = value
        for kind, settings in KINDS:
            with pytest.raises(UserError, match=r"codes are not finite, .*lower the learning rates"):
                build(kind, 2, **settings).fit(codes)
    with pytest.raises(ValueError, match="one row or more"):
        fit_mixture(normal(0, 2), 1)
