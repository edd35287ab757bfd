"""Contexts: of kept layers alone, of embedding nets of every kind, and in all interfaces."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from nflows import transforms as T
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows_couplings import Net, alternating
from torch import Tensor, nn

from glf_fast.conversion import ConversionError, convert
from glf_fast.flow import FlowTransform
from glf_fast.integrations import nflows as as_nflows
from glf_fast.integrations import zuko as as_zuko


def nflows_flow(*layers: nn.Module, context: int = 0, embedding: nn.Module | None = None) -> Flow:
    couplings = alternating(4, 2, lambda a, b: Net(a + context, b, ignores=not context))
    return Flow(T.CompositeTransform([*couplings, *layers]), StandardNormal([4]), embedding)


def kept(context: int) -> nn.Module:
    return T.MaskedAffineAutoregressiveTransform(4, 8, context_features=context, activation=nn.functional.celu)


def same(flow: nn.Module, converted: nn.Module, context: Tensor) -> None:
    x = torch.randn(len(context), 4)
    torch.testing.assert_close(converted.log_prob(x, context), flow.log_prob(x, context), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="is conditional"):
        converted.log_prob(x)


def test_a_context_of_kept_layers_alone() -> None:
    torch.manual_seed(0)
    flow = nflows_flow(kept(3))
    converted = convert(flow)
    assert converted.context_dim == 3
    same(flow, converted, torch.randn(6, 3))
    flow = nflows_flow(kept(3), embedding=nn.Linear(5, 3))
    same(flow, convert(flow), torch.randn(6, 5))


def test_a_kept_layer_whose_parameters_take_no_part_is_refused() -> None:
    """Its context is optional, and nothing says that there is one."""

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.hidden = nn.Linear(2, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.net(x) if context is None else self.net(x) + self.hidden(context)

    layer = T.AffineCouplingTransform(torch.tensor([1, 1, -1, -1]), lambda *_: Conditioned())
    flow = nflows_flow(layer)
    with pytest.raises(ConversionError, match=r"transform_net.hidden.bias takes no part in log_prob\(x\)"):
        convert(flow)
    context = torch.randn(6, 3)
    same(flow, convert(flow, context), context)


class Misleading(nn.Module):
    """The first linear layer that is registered is not the first that is applied."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(6, 3), nn.Linear(5, 6)

    def forward(self, context: Tensor) -> Tensor:
        return self.last(self.first(context).relu())


@pytest.mark.parametrize(
    ("embedding", "shape", "message"),
    [
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(18, 3)), (2, 8), "shape of the context is unknown"),
        (nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)), (5,), "shape of the context is unknown"),
        (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), (5,), "shape of the context is unknown"),
        (Misleading(), (5,), r"embedding_net fails on contexts of shape \(6,\)"),
    ],
    ids=["conv", "layer norm", "batch norm", "misleading"],
)
def test_an_example_says_what_shape_a_context_has(embedding: nn.Module, shape: tuple[int, ...], message: str) -> None:
    torch.manual_seed(0)
    flow = nflows_flow(context=3, embedding=embedding).eval()
    with pytest.raises(ConversionError, match=f"{message}.*give an example"):
        convert(flow)
    context = torch.randn(6, *shape)
    converted = convert(flow, context=context)
    same(flow, converted, context)
    assert converted.distribution(context).rsample((7,)).shape == (7, 6, 4)


def test_an_example_of_classes() -> None:
    """Contexts that random numbers cannot stand for."""
    torch.manual_seed(0)
    flow = nflows_flow(context=6, embedding=nn.Sequential(nn.Embedding(5, 3), nn.Flatten())).eval()
    with pytest.raises(ConversionError, match="give an example"):
        convert(flow)
    context = torch.randint(5, (6, 2))
    same(flow, convert(flow, context), context)
    for wrong in (context[0], context[:0]):
        with pytest.raises(ValueError, match=r"context must be an example of shape \(batch, …\)"):
            convert(flow, wrong)


def test_an_example_for_flows_without_embedding() -> None:
    flow = nf.ConditionalNormalizingFlow(
        nf.distributions.DiagGaussian(4),
        [
            nf.flows.MaskedAffineAutoregressive(4, 8, context_features=3),
            nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4])),
        ],
    )
    with pytest.raises(ConversionError, match="a context is one vector for each sample"):
        convert(flow, torch.randn(5, 2, 3))


def test_all_interfaces_take_the_context_before_the_embedding() -> None:
    torch.manual_seed(0)
    flow = nflows_flow(context=3, embedding=nn.Linear(7, 3))
    converted = convert(flow)
    x, context = torch.randn(5, 4), torch.randn(5, 7)
    wanted = flow.log_prob(x, context)
    assert converted.context_dim == 7 and converted.context_shape == (7,)
    close = lambda got: torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # noqa: E731
    close(converted.distribution(context).log_prob(x))
    close(as_zuko.Flow(converted)(context).log_prob(x))
    close(as_nflows.Flow(converted).log_prob(x, context))
    assert as_nflows.Flow(converted).sample(9, context).shape == flow.sample(9, context).shape
    samples, log_prob = as_nflows.Flow(converted).sample_and_log_prob(9, context)
    torch.testing.assert_close(log_prob[1], flow.log_prob(samples[1], context[1].expand(9, 7)), rtol=1e-3, atol=1e-3)
    transform = FlowTransform(converted, context)
    noise = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(4), torch.ones(4)), 1)
    close(torch.distributions.TransformedDistribution(noise, [transform]).log_prob(x))
