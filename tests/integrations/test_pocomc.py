"""pocoMC's sampler with its own flows, replaced, and with couplings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pocomc
import pytest
import torch
import zuko
from pocomc.flow import Flow
from scipy.stats import uniform

from glf_fast import ConversionError
from glf_fast.flow import CouplingFlow
from glf_fast.integrations.pocomc import FusedFlow, accelerate, coupling_flow

SETTINGS: dict[str, Any] = {"validation_split": 0.5, "patience": 3, "annealing": False}  # of pocoMC's sampler
LOG_Z = -2 * np.log(20)  # of a normalised likelihood well inside of a square of side 20


def log_likelihood(x: np.ndarray) -> np.ndarray:
    """A Gaussian of two correlated parameters, with means of 1 and variances of 1."""
    z = x - 1
    return -(z[:, 0] ** 2 - 1.2 * z[:, 0] * z[:, 1] + z[:, 1] ** 2) / (2 * 0.64) - np.log(2 * np.pi * 0.8)


def sampler(folder: Path, flow: Any = "nsf3") -> pocomc.Sampler:
    return pocomc.Sampler(
        pocomc.Prior(2 * [uniform(-10, 20)]), log_likelihood, flow=flow, vectorize=True, n_active=128, n_effective=256,
        random_state=0, output_dir=folder, pytorch_threads=None,
    )  # fmt: skip


def banana(n: int) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(n, 2)
    x[:, 1] = 0.5 * x[:, 1] + 0.4 * x[:, 0] ** 2
    return x


@pytest.mark.parametrize("kind", ["nsf3", "coupling"])
def test_evidence_and_posterior_are_right(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = "nsf3" if kind == "nsf3" else coupling_flow(2, steps=4, hidden=(32, 32), coupling="spline")
    run = accelerate(sampler(tmp_path, flow))
    assert accelerate(run) is run and isinstance(run.flow, FusedFlow)
    run.run(n_total=512, n_evidence=1000, progress=False)
    log_z, error = run.evidence()
    assert abs(log_z - LOG_Z) < 4 * error + 0.02, (log_z, error)
    x, weights, *_ = run.posterior()
    mean = weights @ x
    assert np.abs(mean - 1).max() < 0.2
    assert abs(weights @ ((x - mean)[:, 0] * (x - mean)[:, 1]) - 0.6) < 0.25


def test_a_saved_run_goes_on(tmp_path: Path) -> None:
    """pocoMC pickles the flow with the sampler."""
    run = accelerate(sampler(tmp_path))
    run.flow.fit(banana(300), torch.ones(300), epochs=2, batch_size=64, **SETTINGS)
    run.run(n_total=256, n_evidence=0, progress=False, save_every=3)
    again = sampler(tmp_path)
    again.load_state(sorted(tmp_path.glob("pmc_*.state"))[-1])
    assert isinstance(again.flow, FusedFlow)
    x = banana(5)
    torch.testing.assert_close(again.flow.inverse(again.flow.forward(x)[0])[0], x, atol=1e-4, rtol=1e-3)
    before = again.flow.log_prob(x)
    again.flow.fit(banana(300), epochs=1, batch_size=64, **SETTINGS)
    assert not torch.equal(again.flow.log_prob(x), before)  # what is trained is what is asked
    final = sorted(tmp_path.glob("pmc_final.state")) or sorted(tmp_path.glob("pmc_*.state"))
    resumed = sampler(tmp_path)
    resumed.run(n_total=256, n_evidence=0, progress=False, resume_state_path=final[-1])
    assert np.isfinite(resumed.evidence()[0])


@pytest.mark.parametrize("kind", ["nsf3", "maf3"])
def test_flow_is_pocomcs_own(kind: str) -> None:
    """The same values as before, and the same methods; training then makes it better by as much."""
    torch.manual_seed(0)
    original = Flow(2, kind)
    fused = FusedFlow(2, copy.deepcopy(original.flow))
    x, u = banana(100), torch.randn(100, 2)
    for name, given in (("forward", x), ("inverse", u), ("log_prob", x)):
        wanted, found = getattr(original, name)(given), getattr(fused, name)(given)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
    samples, log_prob = fused.sample(50)
    torch.testing.assert_close(log_prob, fused.log_prob(samples), atol=1e-3, rtol=1e-3)

    weights = torch.rand(600)
    held_out = banana(3000)[1000:]
    losses = []
    for flow in (original, fused):
        torch.manual_seed(1)
        history = flow.fit(banana(600), weights, epochs=60, batch_size=100, learning_rate=5e-3, **SETTINGS)
        assert len(history["loss"]) == len(history["val_loss"]) > 5
        losses.append(-flow.log_prob(held_out).mean().item())
    assert losses[1] < losses[0] + 0.1, losses


def test_a_flow_that_was_replaced_before_is_taken_as_it_is() -> None:
    first = FusedFlow(2, "maf3")
    assert FusedFlow(2, first.flow)._whole is first._whole


def test_other_settings_leave_the_loop_to_pocomc() -> None:
    torch.manual_seed(0)
    flow = FusedFlow(2, "maf3")
    before = flow.log_prob(banana(300)).mean()
    history = flow.fit(banana(300), epochs=20, batch_size=100, learning_rate=5e-3)  # annealing, no validation
    assert history["val_loss"] == [] and flow.log_prob(banana(300)).mean() > before


def test_integers_of_numpy_and_an_infinite_limit_are_taken() -> None:
    flow = FusedFlow(2, coupling_flow(2, steps=2, hidden=(8,)))
    settings = {**SETTINGS, "patience": np.int64(3), "clip_grad_norm": np.inf}
    history = flow.fit(banana(200), epochs=np.int64(3), batch_size=np.int64(50), **settings)
    assert 1 <= len(history["loss"]) <= 3


@pytest.mark.parametrize("why", ["one transform stays", "another base"])
def test_a_flow_that_is_refused_stays_as_it_was(why: str) -> None:
    flow = zuko.flows.MAF(2, transforms=2)
    if why == "one transform stays":
        flow.transform.transforms.append(zuko.flows.CNF(2).transform)
    else:
        flow.base = zuko.lazy.UnconditionalDistribution(
            zuko.distributions.DiagNormal, torch.zeros(2), 2 * torch.ones(2), buffer=True
        )
    before = list(flow.named_modules())
    with pytest.raises(ConversionError):
        FusedFlow(2, flow)
    after = list(flow.named_modules())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))


def test_a_run_without_glf_fast_goes_on_with_it(tmp_path: Path) -> None:
    sampler(tmp_path).run(n_total=64, n_evidence=0, progress=False, save_every=3)
    again = sampler(tmp_path)
    again.load_state(tmp_path / "pmc_3.state")
    iterations = again.t
    accelerate(again).run(n_total=64, n_evidence=0, progress=False)
    assert isinstance(again.flow, FusedFlow) and again.t > iterations


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"pocomc\.Sampler; got Flow"):
        accelerate(Flow(2))
    with pytest.raises(ConversionError, match="not all of this CNF can be replaced"):
        accelerate(sampler(tmp_path, zuko.flows.CNF(2)))
    with pytest.raises(ValueError, match="Invalid flow type"):
        FusedFlow(2, "nsf4")
    flow = FusedFlow(2, coupling_flow(2, steps=2, hidden=(8,)))
    assert isinstance(flow._whole, CouplingFlow)
    x = banana(100)
    x[3, 0] = torch.nan
    with pytest.raises(ValueError, match="x has NaN or infinity in 1 of 100 rows"):
        flow.fit(x, **SETTINGS)
    with pytest.raises(ValueError, match="epochs must be a whole number"):
        flow.fit(banana(100), epochs=0, **SETTINGS)
