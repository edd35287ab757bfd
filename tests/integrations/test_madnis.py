"""glf_fast's flow in MadNIS: its protocol, its channels, and integrals of known value."""

from __future__ import annotations

import math

import pytest
import torch
from madnis.integrator import Integrand, Integrator
from torch import Tensor

from glf_fast.integrations.madnis import Flow, _orders


def shaken(*arguments: int, **options: object) -> Flow:
    torch.manual_seed(0)
    flow = Flow(*arguments, **options).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return flow


def peaks(x: Tensor, width: float = 0.1) -> Tensor:
    """A normalised Gaussian around 1/2 in every dimension, but for what lies outside of the cube."""
    return torch.exp(-0.5 * ((x - 0.5) / width).square().sum(1)) / (width * math.sqrt(2 * math.pi)) ** x.shape[1]


def test_a_fresh_flow_is_uniform() -> None:
    flow = Flow(3, channels=4)
    x = torch.rand(8, 3)
    torch.testing.assert_close(flow.prob(x), torch.ones(8))
    assert flow.sample(5, channel=2).shape == (5, 3)


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_samples_have_their_density(dim: int) -> None:
    flow = shaken(dim, dims_c=2)
    c = torch.randn(50, 2, dtype=torch.float64)
    x, log_prob, prob = flow.sample(c=c, return_log_prob=True, return_prob=True)
    assert x.dtype == torch.float64 and x.min() >= 0 and x.max() <= 1
    torch.testing.assert_close(flow.log_prob(x, c), log_prob)
    torch.testing.assert_close(flow.prob(x, c), prob)
    if dim == 2:  # its integral over the cube is 1
        grid = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
        points = torch.cartesian_prod(grid, grid)
        assert abs(flow.prob(points, c[:1].expand(len(points), 2)).mean().item() - 1) < 1e-2


def test_channels_are_flows_of_their_own() -> None:
    flow = shaken(3, channels=3)
    x = torch.rand(12, 3, dtype=torch.float64)
    single = [flow.log_prob(x, channel=i) for i in range(3)]
    assert not torch.allclose(single[0], single[1])
    channel = torch.randint(3, (12,))
    wanted = torch.stack(single)[channel, torch.arange(12)]
    torch.testing.assert_close(flow.log_prob(x, channel=channel), wanted)
    equal = torch.arange(3).repeat_interleave(4)
    torch.testing.assert_close(flow.log_prob(x), flow.log_prob(x, channel=equal))
    torch.testing.assert_close(flow.log_prob(x, channel=[4, 4, 4]), flow.log_prob(x))
    turned = shaken(3, channels=3, channel_remap_function=lambda channel: 2 - channel)
    torch.testing.assert_close(turned.log_prob(x, channel=2 - channel), wanted)
    samples, log_prob = flow.sample(12, channel=channel, return_log_prob=True)
    torch.testing.assert_close(flow.log_prob(samples, channel=channel), log_prob)


@pytest.mark.parametrize("dim", range(2, 18))
def test_every_dimension_is_transformed_equally_often_and_given_every_other(dim: int) -> None:
    least = 2 * math.ceil(math.log2(dim))
    for blocks in (least, 2 * least, 2 * least + 1):
        at, count = torch.arange(dim), torch.zeros(dim, dtype=torch.int64)
        met = torch.eye(dim, dtype=torch.bool)
        for order in _orders(dim, blocks):
            at = at[order]
            transformed, given = at[dim - dim // 2 :], at[: dim - dim // 2]
            count[transformed] += 1
            met[transformed[:, None], given] = True
        assert met.all()
        assert count.min() >= blocks // 2 - (1 if blocks == least else 2)
        assert count.max() <= (blocks + 1) // 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"channel": [1, 2]}, "3 numbers of samples that add up to 4"),
        ({"channel": None}, "cannot be divided equally among 3"),
        ({"channel": 3}, "from 0 to 2"),
        ({"channel": torch.tensor([0, 1, 2])}, "must be 4 integers"),
    ],
)
def test_channels_that_do_not_fit_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flow(2, channels=3).prob(torch.rand(4, 2), **given)
    with pytest.raises(ValueError, match="number of samples n"):
        Flow(2).sample()


def test_madnis_integrates_with_it() -> None:
    torch.manual_seed(0)
    integrator = Integrator(peaks, dims=4, flow=Flow(4), batch_size=512, learning_rate=3e-3)
    before = integrator.integration_metrics(10_000)
    integrator.train(60)
    after = integrator.integration_metrics(10_000)
    assert abs(after.integral - 1) < 5 * after.error < 0.1
    assert after.rel_stddev < 0.5 * before.rel_stddev


def test_madnis_integrates_channels() -> None:
    """Two channels that are shifted copies of one another, of weight 0.5 each."""
    torch.manual_seed(0)

    def function(x: Tensor, channel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return peaks(x), x, torch.full((len(x), 2), 0.5, dtype=x.dtype)

    integrand = Integrand(function, input_dim=2, channel_count=2, remapped_dim=2, has_channel_weight_prior=True)
    integrator = Integrator(
        integrand, flow=Flow(2, channels=2), batch_size=400, learning_rate=3e-3, train_channel_weights=False
    )
    integrator.train(40)
    found = integrator.integration_metrics(10_000)
    assert abs(found.integral - 1) < 5 * found.error < 0.1
