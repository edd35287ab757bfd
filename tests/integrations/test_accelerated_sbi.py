"""Estimators of sbi's own builders, accelerated: which are replaced, and that they still estimate the same."""

import copy

import pytest
import torch
from sbi.neural_nets import likelihood_nn, posterior_nn

from glf_fast import accelerate


@pytest.mark.parametrize(("build", "model"), [(posterior_nn, "maf"), (likelihood_nn, "maf"), (posterior_nn, "maf_rqs")])
def test_default_estimators_become_one_flow(build, model: str) -> None:
    torch.manual_seed(0)
    theta, x = torch.randn(60, 3) * 2 + 1, torch.randn(60, 2)
    estimator = build(model=model, num_transforms=2)(theta, x)
    inputs, conditions = (theta, x) if build is posterior_nn else (x, theta)
    original = copy.deepcopy(estimator)
    report = accelerate(estimator)
    assert [(r.couplings, r.into["AutoregressiveFlow"]) for r in report.replaced] == [(2, 1)] and not report.left
    wanted, got = (each.log_prob(inputs[None, :9], conditions[:9]) for each in (original, estimator))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    found = [each.loss(inputs, conditions).mean() for each in (original, estimator)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    samples = []
    for each in (original, estimator):
        torch.manual_seed(1)
        samples.append(each.sample((7,), conditions[:3]))
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-3, atol=1e-3)


def test_a_mixture_is_named_as_the_reason() -> None:
    report = accelerate(posterior_nn(model="made")(torch.randn(60, 3), torch.randn(60, 2)))
    assert not report and "MADEMoGWrapper" in report.left[0].reason
