"""glf_fast's flow as BayesFlow's inference network, on a simulator with a known posterior."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

MISSING = not all(importlib.util.find_spec(name) for name in ("bayesflow", "keras"))
pytestmark = [
    pytest.mark.skipif(MISSING, reason="bayesflow is not installed: run make communities"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
NOISE = 0.5


@pytest.fixture(scope="module")
def bayesflow() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    before = torch.is_grad_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bayesflow
    import keras

    keras.utils.set_random_seed(0)
    yield bayesflow
    torch.set_grad_enabled(before)  # the import turns gradients off


@pytest.fixture(scope="module")
def workflow(bayesflow: Any) -> Any:
    """A workflow after its training, with θ ~ N(0, I) of two dimensions and x ~ N(θ, NOISE²)."""
    from glf_fast.integrations.bayesflow import CouplingFlow

    def prior() -> dict[str, Any]:
        return {"theta": np.random.normal(size=2)}

    def likelihood(theta: Any) -> dict[str, Any]:
        return {"x": np.random.normal(theta, NOISE)}

    workflow = bayesflow.BasicWorkflow(
        simulator=bayesflow.make_simulator([prior, likelihood]),
        inference_network=CouplingFlow(depth=2, widths=(32, 32)),
        inference_variables=["theta"],
        inference_conditions=["x"],
        initial_learning_rate=3e-3,
    )
    history = workflow.fit_online(epochs=4, batch_size=128, num_batches_per_epoch=60, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    return workflow


def test_the_posterior_is_the_known_one(workflow: Any) -> None:
    x = np.array([[0.5, -1.0], [-1.5, 0.2]])
    samples = workflow.sample(num_samples=2000, conditions={"x": x})["theta"]
    assert samples.shape == (2, 2000, 2)
    shrink = 1 / (1 + NOISE**2)
    np.testing.assert_allclose(samples.mean(1), shrink * x, atol=0.1)
    np.testing.assert_allclose(samples.std(1), math.sqrt(shrink) * NOISE, atol=0.08)
    theta = np.array([[0.3, -0.5]])
    found = workflow.log_prob({"theta": theta, "x": x[:1]})
    variance = shrink * NOISE**2
    wanted = -0.5 * np.square(theta - shrink * x[:1]).sum() / variance - math.log(2 * math.pi * variance)
    assert abs(float(np.squeeze(found)) - wanted) < 0.3


def test_both_directions_are_inverses(workflow: Any) -> None:
    network = workflow.approximator.inference_network
    x, c = torch.randn(3, 5, 2), torch.randn(3, 5, 2)
    z, log_prob = network(x, conditions=c, density=True)
    back, again = network(z, conditions=c, inverse=True, density=True)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, log_prob, rtol=1e-4, atol=1e-4)
    assert log_prob.shape == (3, 5)


def test_conditions_belong_to_their_parameters(workflow: Any) -> None:
    network = workflow.approximator.inference_network
    x, c = torch.randn(3, 5, 2), torch.randn(5, 2)
    for inverse in (False, True):
        with pytest.raises(ValueError, match=r"leading shape of the parameters, \(3, 5\); got \(5, 2\)"):
            network(x, conditions=c, inverse=inverse)
        with pytest.raises(ValueError, match=r"leading shape of the parameters, \(5, 5\); got \(5, 2\)"):
            network(torch.randn(5, 5, 2), conditions=c, inverse=inverse)


@pytest.mark.parametrize("shape", [(0, 2), (0, 5, 2), (3, 0, 2)])
def test_empty_batches(workflow: Any, shape: tuple[int, ...]) -> None:
    network = workflow.approximator.inference_network
    for inverse in (False, True):
        z, log_prob = network(torch.zeros(shape), conditions=torch.zeros(shape), inverse=inverse, density=True)
        assert (z.shape, log_prob.shape) == (shape, shape[:-1])


def test_metrics_of_the_user_are_computed_in_validation(bayesflow: Any) -> None:
    from glf_fast.integrations.bayesflow import CouplingFlow

    workflow = bayesflow.BasicWorkflow(
        simulator=bayesflow.make_simulator(
            [lambda: {"theta": np.random.normal(size=2)}, lambda theta: {"x": np.random.normal(theta, NOISE)}]
        ),
        inference_network=CouplingFlow(depth=1, widths=(8,)),
        inference_variables=["theta"],
        inference_conditions=["x"],
    )
    metric = bayesflow.metrics.RootMeanSquaredError(name="rmse")
    workflow.approximator.compile(optimizer="adam", inference_metrics=[metric])
    history = workflow.fit_online(
        epochs=2, batch_size=64, num_batches_per_epoch=2, validation_data=200, verbose=0
    ).history
    (name,) = (name for name in history if "rmse" in name)
    assert name.startswith("val_")
    assert all(0.1 < value < 5 for value in history[name]), history


def test_saved_and_loaded(workflow: Any, tmp_path: Path) -> None:
    import keras

    approximator = workflow.approximator
    approximator.save(tmp_path / "approximator.keras")
    loaded = keras.saving.load_model(tmp_path / "approximator.keras")
    x, c = torch.randn(4, 2), torch.randn(4, 2)
    wanted, got = (a.inference_network(x, conditions=c, density=True)[1] for a in (approximator, loaded))
    torch.testing.assert_close(got, wanted)


def test_sizes_that_do_not_fit_are_named(bayesflow: Any) -> None:
    from glf_fast.integrations.bayesflow import CouplingFlow

    with pytest.raises(ValueError, match="depth"):
        CouplingFlow(depth=0)
    with pytest.raises(ValueError, match="dim"):
        CouplingFlow().build((10, 1), (10, 2))


def test_the_scale_is_bayesflows(bayesflow: Any) -> None:
    from bayesflow.networks.inference.coupling.transforms import AffineTransform

    from glf_fast.integrations.bayesflow import CouplingFlow
    from glf_fast.reference import log_scale

    network = CouplingFlow(depth=1)
    network.build((10, 4))
    u = torch.linspace(-50, 50, 201)
    wanted = AffineTransform().constrain_parameters({"scale": u})["scale"]
    torch.testing.assert_close(log_scale(u, network.flow.config["log_scale"]).exp(), wanted)


@pytest.mark.parametrize("dim", [2, 5, 8])
def test_a_pair_of_couplings_transforms_every_column_once(bayesflow: Any, dim: int) -> None:
    from glf_fast.integrations.bayesflow import CouplingFlow

    network = CouplingFlow(depth=1)
    network.build((10, dim))
    with torch.no_grad():
        network.flow.mlp_biases[-1][:, dim // 2 :] = 1  # the shifts
    z = network(torch.zeros(3, dim))
    assert z.sort(1).values.tolist() == [[0.0] * (dim % 2) + [1.0] * (dim - dim % 2)] * 3


def test_example_of_the_documentation(bayesflow: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text(encoding="utf-8")
    section = text.split("## BayesFlow")[1].split("\n## ")[0]
    (block,) = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    exec(block, {"__name__": "documentation"})
