"""aspire with flows of glf_fast, which it finds by their name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glf_fast import ConversionError
from glf_fast.flow import CouplingFlow

if sys.version_info < (3, 11):
    pytest.skip("aspire needs Python 3.11", allow_module_level=True)
from aspire import Aspire, Samples
from aspire.flows import get_flow_wrapper
from aspire.flows.torch.flows import ZukoFlow

from glf_fast.integrations.aspire import FusedFlow

DIMS = 3
NAMES = [f"x{i}" for i in range(DIMS)]
LOG_Z = -DIMS * np.log(20)


def near_posterior(n: int = 2000) -> Samples:
    return Samples(1.3 * np.random.default_rng(0).standard_normal((n, DIMS)), parameters=NAMES)


def run(flow_backend: str = "glf_fast", **options: Any) -> Aspire:
    return Aspire(
        log_likelihood=lambda s: -0.5 * (s.x**2).sum(-1) - DIMS / 2 * np.log(2 * np.pi),
        log_prior=lambda s: LOG_Z + 0 * s.x[:, 0],
        dims=DIMS, parameters=NAMES, prior_bounds={name: [-10, 10] for name in NAMES}, flow_backend=flow_backend, **options,
    )  # fmt: skip


COUPLING = {"flow_class": "CouplingFlow", "steps": 3, "hidden": (16, 16)}


@pytest.mark.parametrize(
    "options", [{}, {"flow_class": "NSF", "transforms": 2}, COUPLING], ids=["maf", "nsf", "coupling"]
)
def test_evidence_is_right(options: dict[str, Any]) -> None:
    aspire = run(**options)
    history = aspire.fit(near_posterior(), n_epochs=30)
    assert isinstance(aspire.flow, FusedFlow)
    assert len(history.training_loss) == len(history.validation_loss) == 30
    found = aspire.sample_posterior(n_samples=2000, sampler="importance")
    assert abs(found.log_evidence - LOG_Z) < 4 * found.log_evidence_error
    assert found.log_evidence_error < 0.1  # the flow is near the posterior


@pytest.mark.filterwarnings("ignore:Passing rng to the Sampler constructor:UserWarning")  # aspire to minipcn
def test_sequential_monte_carlo_runs_on_it() -> None:
    aspire = run()
    aspire.fit(near_posterior(), n_epochs=20)
    found = aspire.sample_posterior(n_samples=500, sampler="smc", sampler_kwargs={"n_steps": 10})
    # Twice and more of the error that it states, as with zuko's flow.
    assert abs(found.log_evidence - LOG_Z) < 0.3 and found.log_evidence_error < 0.1


@pytest.mark.parametrize("options", [{}, {"flow_class": "NSF", "transforms": 2, "hidden_features": [16]}, COUPLING])
def test_a_saved_flow_is_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    import h5py

    aspire = run(**options)
    aspire.fit(near_posterior(500), n_epochs=2)
    x = near_posterior(50).x
    with h5py.File(tmp_path / "flow.h5", "w") as file:
        aspire.save_flow(file)
    again = run(**options)
    with h5py.File(tmp_path / "flow.h5") as file:
        again.load_flow(file)
    assert isinstance(again.flow, FusedFlow) and again.flow is not aspire.flow
    torch.testing.assert_close(again.flow.log_prob(x), aspire.flow.log_prob(x))
    again.fit(near_posterior(500), n_epochs=1)
    assert not torch.equal(again.flow.log_prob(x), aspire.flow.log_prob(x))


@pytest.mark.filterwarnings("ignore:torch.asarray. unspecified requires_grad:UserWarning")  # array_api_compat
def test_flow_is_aspires_own() -> None:
    """The same values as before from the same seed, with the same methods; training makes it as good."""
    assert get_flow_wrapper("glf_fast")[0] is FusedFlow
    original, fused = ZukoFlow(DIMS, seed=3), FusedFlow(DIMS, seed=3)
    original.flow._compiled_call_impl = None  # aspire compiles it, which takes longer than the rest
    x, z = torch.randn(20, DIMS), torch.randn(20, DIMS)
    for name, given in (("forward", x), ("inverse", z), ("log_prob", x)):
        found, wanted = (getattr(flow, name)(given) for flow in (fused, original))
        for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b.detach(), atol=1e-4, rtol=1e-4)
    assert all(isinstance(part, np.ndarray) for part in fused.inverse(z, xp=np))
    assert fused.sample(5).shape == (5, DIMS)
    samples, log_prob = fused.sample_and_log_prob(20)
    torch.testing.assert_close(log_prob, fused.log_prob(samples), atol=1e-4, rtol=1e-4)
    wanted, found = (
        flow.fit(torch.from_numpy(near_posterior(1000).x), n_epochs=40, patience=20, clip_grad=5.0, lr_annealing=True)
        for flow in (original, fused)
    )
    assert abs(min(found.validation_loss) - min(wanted.validation_loss)) < 0.15


def test_double_precision() -> None:
    flow = FusedFlow(DIMS, dtype="float64", **COUPLING)
    assert isinstance(flow._whole, CouplingFlow)
    flow.fit(near_posterior(400).x, n_epochs=2, validation_fraction=0)
    assert flow.log_prob(near_posterior(5).x).dtype == torch.float64


def test_integers_of_numpy_are_taken() -> None:
    history = FusedFlow(DIMS, **COUPLING).fit(
        near_posterior(400).x, n_epochs=np.int64(3), batch_size=np.int64(100), patience=np.int32(2)
    )
    assert 1 <= len(history.training_loss) <= 3


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ValueError, match="name of a flow of zuko, or CouplingFlow; got 'Flux'"):
        FusedFlow(DIMS, "Flux")
    with pytest.raises(ConversionError, match="not all of this CNF can be replaced"):
        FusedFlow(DIMS, "CNF")
    with pytest.raises(ConversionError, match="not all of this MAF can be replaced"):
        FusedFlow(1)
    x = near_posterior(100).x
    x[3, 0] = np.nan
    with pytest.raises(ValueError, match="x has NaN or infinity in 1 of 100 rows"):
        FusedFlow(DIMS).fit(x)
    with pytest.raises(ValueError, match="epochs must be a whole number"):
        FusedFlow(DIMS).fit(near_posterior(100).x, n_epochs=0)
