"""The study of sbi's posteriors: its reference samples are exact, its rows are resumed, its table says what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import posteriors
from bench.sbi_tasks import TASKS, exact_samples


def slcp_log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    """By torch's own normal distribution."""
    s, rho = theta[:, 2:4].square(), theta[:, 4].tanh()
    covariance = torch.diag_embed(s.square())
    covariance[:, 0, 1] = covariance[:, 1, 0] = rho * s.prod(1)
    normal = torch.distributions.MultivariateNormal(theta[:, :2], covariance)
    return sum(normal.log_prob(point) for point in x.view(4, 2))


@pytest.mark.parametrize("observation", [0, 2, 3])
def test_slcps_exact_samples_have_the_moments_of_weighted_draws_from_the_prior(observation: int) -> None:
    x = TASKS["SLCP"].observations()[observation].double()
    torch.manual_seed(0)
    theta = 6 * torch.rand(300_000, 5).double() - 3
    weights = torch.softmax(slcp_log_likelihood(theta, x), 0)
    samples = exact_samples(TASKS["SLCP"], observation, 4000).double()
    assert (samples.abs() <= 3).all() and torch.equal(samples.float(), exact_samples(TASKS["SLCP"], observation, 4000))
    effective = 1 / weights.square().sum()
    for name, f in {"θ": lambda t: t, "|θ|": torch.abs, "θ²": torch.square}.items():
        mean = weights @ f(theta)
        spread = (weights @ (f(theta) - mean).square()).sqrt()
        error = spread * (1 / effective + 1 / len(samples)).sqrt()
        assert ((f(samples).mean(0) - mean).abs() < 4.5 * error).all(), name
    signs = torch.stack([(samples[:, 2] > 0), (samples[:, 3] > 0)], 1).double().mean(0)
    torch.testing.assert_close(signs, torch.full_like(signs, 0.5), rtol=0, atol=0.04)


def test_posteriors_of_other_tasks_are_those_of_simulations_near_the_observation() -> None:
    """Simulations whose x is near an observation have the posterior's θ: what its definition says."""
    torch.manual_seed(0)
    for name, near in (("two moons", 0.02), ("Gaussian linear", 0.5)):
        task = TASKS[name]
        x = task.observations()[0]
        if name == "Gaussian linear":  # in ten dimensions nothing is near: of independent columns, one at a time
            theta = task.prior().sample((200_000,))
            chosen = (task.simulate(theta)[:, 0] - x[0]).abs() < near / 20
            found, exact = theta[chosen][:, :1], task.posterior(x, 4000)[:, :1]
        else:
            theta = task.prior().sample((1_000_000,))
            chosen = ((task.simulate(theta) - x).abs() < near).all(1)
            found, exact = theta[chosen], task.posterior(x, 4000)
        assert len(found) > 300
        for f in (lambda t: t, torch.abs, torch.square):
            error = f(found).std(0) * (1 / len(found) + 1 / len(exact)) ** 0.5
            assert ((f(found).mean(0) - f(exact).mean(0)).abs() < 4.5 * error + 1e-3).all(), name


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch) -> None:
    measured = []

    def measure(task: str, estimator: str, seed: int, **sizes: int) -> dict[str, object]:
        measured.append((task, estimator, seed))
        if len(measured) == 5:
            raise KeyboardInterrupt
        if estimator == "accelerate":
            raise RuntimeError("accelerate replaced nothing")
        seconds = (10.0 if estimator == "sbi" else 2.0) + seed
        return {"seconds": seconds, "sampling_seconds": 0.5, "epochs": 50 + seed, "c2st": 0.6, "c2st_each": [0.6]}

    monkeypatch.setattr(posteriors, "measure", measure)
    sizes = {"simulations": 10, "drawn": 10_000, "judged": 5}
    names = (["SLCP"], ["sbi", "accelerate", "glf_fast"], 2)
    with pytest.raises(KeyboardInterrupt):
        posteriors.study(tmp_path, *names, **sizes)
    found = posteriors.study(tmp_path, *names, **sizes)
    assert len(found["rows"]) == 4 and len({(row["estimator"], row["seed"]) for row in found["rows"]}) == 4
    text = (tmp_path / "posteriors.md").read_text()
    assert "| SLCP | sbi | 10.5 ± 0.7 s | 50 ± 1 | 0.500 ± 0.000 s | 1.00 | 0.600 ± 0.000 | 2 |" in text
    assert "| SLCP | glf_fast | 2.5 ± 0.7 s | 50 ± 1 | 0.500 ± 0.000 s | 3.67 |" in text
    with pytest.raises(ValueError, match=r"rows of sizes .* choose another folder"):
        posteriors.study(tmp_path, *names, **{**sizes, "simulations": 20})
