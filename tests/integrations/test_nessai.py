"""nessai's samplers with flows of glf_fast, and their training in C++."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nessai.flowmodel import FlowModel
from nessai.flowsampler import FlowSampler
from nessai.livepoint import live_points_to_array
from nessai.model import Model
from nessai.proposal.utils import get_flow_proposal_class

from glf_fast.integrations.nessai import FusedFlowModel, FusedFlowProposal, NessaiFlow, coupling_flow

SIZES = {"n_inputs": 3, "n_neurons": 6, "n_blocks": 3, "n_layers": 2}


class Gaussian(Model):
    """Two correlated parameters, with means of 1 and variances of 1, in a square of side 20."""

    names = ["x", "y"]  # noqa: RUF012 — nessai's own attributes
    bounds = {"x": [-10, 10], "y": [-10, 10]}  # noqa: RUF012
    log_z = -2 * np.log(20)

    def log_prior(self, x: np.ndarray) -> np.ndarray:
        return np.log(self.in_bounds(x), dtype=float) + self.log_z

    def log_likelihood(self, x: np.ndarray) -> np.ndarray:
        x, y = x["x"] - 1, x["y"] - 1
        return -(x**2 - 1.2 * x * y + y**2) / (2 * 0.64) - np.log(2 * np.pi * 0.8)

    def to_unit_hypercube(self, x: np.ndarray) -> np.ndarray:
        return self._scaled(x, lambda v: (v + 10) / 20)

    def from_unit_hypercube(self, x: np.ndarray) -> np.ndarray:
        return self._scaled(x, lambda v: 20 * v - 10)

    def _scaled(self, x: np.ndarray, function: Any) -> np.ndarray:
        out = x.copy()
        for name in self.names:
            out[name] = function(x[name])
        return out


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """nessai sets the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sampler(folder: Path, **options: Any) -> FlowSampler:
    settings = {"nlive": 150, "seed": 1, "plot": False, "signal_handling": False, "resume": False}
    if "importance_nested_sampler" not in options:
        settings["proposal_plots"] = False
    return FlowSampler(Gaussian(), output=str(folder), **settings | options)


def check(run: FlowSampler) -> None:
    """The evidence and the posterior, against their known values."""
    error = run.ns.log_evidence_error
    assert abs(run.ns.log_evidence - Gaussian.log_z) < 4 * error, (run.ns.log_evidence, error)
    x = live_points_to_array(run.posterior_samples, ["x", "y"])
    assert np.abs(x.mean(0) - 1).max() < 0.35
    assert np.abs(np.cov(x.T) - [[1, 0.6], [0.6, 1]]).max() < 0.5


@pytest.mark.parametrize("options", [{}, {"flow_config": {"coupling": "spline", "net": "mlp", "n_neurons": 16}}])
def test_nested_sampling_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    run = sampler(tmp_path, flow_proposal_class="glf_fast", **options)
    run.run(plot=False, save=False)
    assert type(run.ns.proposal) is FusedFlowProposal and type(run.ns.proposal.flow) is FusedFlowModel
    assert isinstance(run.ns.proposal.flow.model, NessaiFlow) and run.ns.proposal.training_count > 1
    check(run)


def test_the_flow_alone_in_nessais_own_proposal(tmp_path: Path) -> None:
    run = sampler(tmp_path, flow_config={"flow": coupling_flow}, reset_weights=2)
    run.run(plot=False, save=False)
    assert type(run.ns.proposal.flow) is FlowModel and isinstance(run.ns.proposal.flow.model, NessaiFlow)
    check(run)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:nessai")  # NaN and log 0, before its first level
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_importance_nested_sampling(tmp_path: Path) -> None:
    run = sampler(
        tmp_path, importance_nested_sampler=True, nlive=300, min_samples=50, max_iteration=4,
        flow_config={"flow": coupling_flow}, training_config={"max_epochs": 30},
    )  # fmt: skip
    run.run(plot=False, save=False)
    assert abs(run.ns.log_evidence - Gaussian.log_z) < 5 * run.ns.log_evidence_error + 0.05


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    options = {"flow_proposal_class": "glf_fast", "resume": True}
    first = sampler(tmp_path, max_iteration=600, **options)
    first.run(plot=False, save=False)
    first.ns.checkpoint()
    assert first.ns.proposal.training_count and not first.ns.condition <= first.ns.tolerance
    weights = {name: t.clone() for name, t in first.ns.proposal.flow.model.state_dict().items()}
    second = sampler(tmp_path, **options)
    assert second.ns.iteration == first.ns.iteration
    second.ns.initialise()
    for name, t in second.ns.proposal.flow.model.state_dict().items():
        torch.testing.assert_close(t, weights[name], msg=name)
    second.ns.max_iteration = np.inf
    second.run(plot=False, save=False)
    assert second.ns.iteration > first.ns.iteration
    check(second)


def flow_model(
    folder: Path, kind: type[FlowModel] = FusedFlowModel, flow_config: dict[str, Any] | None = None, **training: Any
) -> FlowModel:
    torch.manual_seed(0)
    model = kind(
        flow_config={**SIZES, "flow": coupling_flow, **(flow_config or {})},
        training_config={"max_epochs": 8, "batch_size": 300, **training},
        output=str(folder),
        rng=np.random.default_rng(0),
    )
    model.initialise()
    return model


def rows(n: int = 1000) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((n, 3))
    x[:, 1] += x[:, 0] ** 2
    return x


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"annealing": True, "clip_grad_norm": None},
        {"noise_type": "constant", "noise_scale": 0.1},
        {"optimiser": "adam"},
    ],
)
def test_training_is_nessais(training: dict[str, Any], tmp_path: Path) -> None:
    """The same batches, steps, losses and weights as in nessai's own loop."""
    histories, models = [], []
    for kind in (FlowModel, FusedFlowModel):
        model = flow_model(tmp_path, kind, **training)
        torch.manual_seed(1)
        histories.append(model.train(rows(), plot=False))
        models.append(model)
    assert histories[1]["loss"][-1] < histories[1]["loss"][0]
    tolerance = 0.05 if "noise_type" in training else 1e-3  # noise is drawn for the whole epoch at once, another noise
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(histories[1][name], histories[0][name], rtol=tolerance)
    steps = {id(m): [int(s["step"]) for s in m._optimiser.state.values()] for m in models}
    assert len({tuple(s) for s in steps.values()}) == 1


@pytest.mark.parametrize("how", ["weights", "conditional"])
def test_weights_and_conditions(how: str, tmp_path: Path) -> None:
    model = flow_model(tmp_path)
    if how == "conditional":
        model.flow_config["context_features"] = 1
        model.initialise()
    given = np.random.default_rng(2).uniform(0.5, 1, (1000, 1) if how == "conditional" else 1000)
    history = model.train(rows(), plot=False, **{how: given})
    assert history["loss"][-1] < history["loss"][0]
    condition = given[:7] if how == "conditional" else None
    assert model.sample_and_log_prob(7, conditional=condition)[0].shape == (7, 3)


def test_the_flow_has_nessais_methods(tmp_path: Path) -> None:
    model = flow_model(tmp_path)
    model.train(rows(), plot=False)
    x = rows(50)
    z, log_prob = model.forward_and_log_prob(x)
    np.testing.assert_allclose(log_prob, model.log_prob(x), atol=1e-4)
    again, logdet = model.inverse(z)
    np.testing.assert_allclose(again, x, atol=1e-3)
    normal = -0.5 * (z**2).sum(1) - 1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(normal - logdet, log_prob, atol=1e-3)
    samples, log_prob = model.sample_and_log_prob(50)
    np.testing.assert_allclose(model.log_prob(samples), log_prob, atol=1e-3)
    assert model.sample(4).shape == model.sample_latent_distribution(4).shape == (4, 3)
    for method, trained in ((model.model.freeze_transform, False), (model.model.unfreeze_transform, True)):
        method()
        assert {p.requires_grad for p in model.model.parameters()} == {trained}


def test_weights_are_reset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = flow_model(tmp_path)
    model.train(rows(), plot=False)
    before = {name: t.clone() for name, t in model.model.state_dict().items()}
    model.reset_model(weights=True)
    assert "Could not reset" not in caplog.text
    assert not model.model.flow.actnorm_initialized.any()
    assert any(not torch.equal(t, before[name]) for name, t in model.model.state_dict().items())
    history = model.train(5 + rows(), plot=False)  # ActNorms start from these rows
    assert history["loss"][0] < 8


@pytest.mark.parametrize("linear_transform", ["lu", "permutation"])
def test_permutations_and_weights_are_reset_one_by_one(linear_transform: str, tmp_path: Path) -> None:
    model = flow_model(tmp_path, flow_config={"linear_transform": linear_transform, "n_inputs": 8})
    x = np.random.default_rng(3).standard_normal((500, 8))
    for reset in ("weights", "permutations"):
        model.train(x, plot=False)
        before = {name: t.clone() for name, t in model.model.flow.state_dict().items()}
        model.reset_model(**{"weights": False, reset: True})
        for name, t in model.model.flow.state_dict().items():
            if name == "linear_sign":
                continue  # always 1
            renewed = name.startswith("linear_") == (reset == "permutations")
            assert torch.equal(t, before[name]) != renewed, name
        z, _ = model.forward_and_log_prob(x)
        np.testing.assert_allclose(model.inverse(z)[0], x, atol=1e-3)


def test_the_callers_flow_config_is_left_as_it_is(tmp_path: Path) -> None:
    config = {"n_neurons": 16}
    run = sampler(tmp_path, flow_proposal_class="glf_fast", flow_config=config)
    run.ns.initialise()
    proposal = run.ns._flow_proposal  # which nessai turns to when uninformed proposals fail
    proposal.initialise()
    assert proposal.flow_config["flow"] is coupling_flow and config == {"n_neurons": 16}


def test_training_outlives_a_loss_that_is_not_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in nessai's own loop: the epoch has a loss of NaN, and the best weights are loaded in the end."""
    model = flow_model(tmp_path, lr=1e30)
    history = model.train(rows(), plot=False)
    assert np.isnan(history["loss"]).any()
    assert "of the flow is not finite" in caplog.text and "lower lr" in caplog.text.lower()
    assert all(t.isfinite().all() for t in model.model.state_dict().values())
    assert np.isfinite(model.log_prob(rows())).all()


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    assert get_flow_proposal_class("glf_fast") is FusedFlowProposal
    for options, message in (
        ({"net": "transformer"}, "net must be 'resnet' or 'mlp'; got 'transformer'"),
        ({"linear_transform": "svd"}, "linear_transform must be 'lu' or 'permutation'; got 'svd'"),
        ({"activation": torch.sin}, "activation must be 'relu', 'tanh', 'silu' or 'swish'"),
        ({"mask": [1, -1, 1]}, "this flow has no mask"),
        ({"distribution": object()}, "this flow has no distribution"),
        ({"batch_norm_between_layers": True}, "this flow has no batch_norm_between_layers, but ActNorms"),
        ({"n_inputs": 1}, "dim must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            coupling_flow(**SIZES | options)
