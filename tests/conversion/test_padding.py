"""Padding never makes a converted flow slower: narrow couplings are not stacked with wide ones, hopeless ones stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import normflows as nf
import pytest
import torch
from nflows import transforms as T
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows_couplings import Net
from torch import nn

from glf_fast import CouplingFlow
from glf_fast.conversion import ConversionError, convert, nflows
from glf_fast.conversion.accelerate import accelerate
from glf_fast.conversion.layers import Kept
from glf_fast.conversion.reading import read_flow


def blocks(widths: list[int], dim: int = 20, scale_map: str = "exp") -> nf.NormalizingFlow:
    layers: list[nn.Module] = []
    for width in reversed(widths):  # normflows starts at the noise
        net = nf.nets.MLP([dim // 2, width, width, dim])
        layers += [nf.flows.AffineCouplingBlock(net, scale_map=scale_map), nf.flows.Permute(dim)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)


def steps(flow: nn.Module) -> list[int]:
    """Of each CouplingFlow, data → noise."""
    return [m.config["steps"] for m in flow.modules() if isinstance(m, CouplingFlow)]


@pytest.mark.parametrize("scale_map", ["exp", "sigmoid_inv"])
@pytest.mark.parametrize(
    ("widths", "runs"),
    [
        ([16] * 7 + [512], [7, 1]),
        ([512, 16, 16, 512], [1, 2, 1]),
        ([16, 24, 8, 16], [4]),
        ([16] * 3 + [512] * 5, [3, 4, 1]),  # an optimizer is slower with parameters of more than 4 MB
    ],
)
def test_a_wide_network_does_not_widen_the_narrow_ones(widths: list[int], runs: list[int], scale_map: str) -> None:
    flow = blocks(widths, scale_map=scale_map)
    converted = convert(flow)  # which compares it, in float64
    assert steps(converted) == runs
    if len(runs) > 1:
        assert sum(p.numel() for p in converted.parameters()) == sum(p.numel() for p in flow.parameters())
    assert accelerate(flow)
    assert sorted(steps(flow)) == sorted(runs)


def test_layers_whose_products_take_all_time_stay() -> None:
    flow = blocks([16, 16, 1024])
    report = accelerate(flow)
    assert steps(flow) == [2]
    assert "has layers of 1,024 × 1,024, whose products take all time, fused or not" in str(report)


def test_couplings_of_splines_with_wide_layers_keep_their_networks() -> None:
    layers = [nf.flows.CoupledRationalQuadraticSpline(6, 2, width, num_bins=4) for width in (512, 16)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(6, trainable=False), layers)
    converted = convert(flow)
    assert steps(converted) == [1]
    assert {type(m).__name__ for m in converted.modules()} >= {"SplineCoupling", "ResidualNet"}


def lopsided(dim: int, transformed: int, hidden: int = 64) -> T.AffineCouplingTransform:
    mask = (torch.arange(dim) < transformed).int()
    return T.AffineCouplingTransform(mask, partial(Net, hidden=(hidden,)))


def test_a_coupling_of_few_columns_of_many_stays_as_it_is() -> None:
    """1 of 128 columns: the kernels' halves would make 253 columns of them."""
    few, half = lopsided(128, 1), lopsided(128, 64, hidden=128)
    with pytest.raises(ConversionError, match=r"transforms 1 of 128 columns with 8,256 multiply-adds"):
        convert(Flow(few, StandardNormal([128])))
    flow = Flow(T.CompositeTransform([half, few, lopsided(128, 64, hidden=128)]), StandardNormal([128]))
    assert [type(layer).__name__ for layer in convert(flow).layers].count("AffineCouplingTransform") == 1
    report = accelerate(flow)
    assert len(report.replaced) == 2 and "transforms 1 of 128 columns" in str(report)
    assert flow._transform._transforms[1] is few


def test_a_gpu_minds_launches_more_than_padding() -> None:
    flow = Flow(lopsided(128, 1), StandardNormal([128])).double()
    assert [isinstance(layer, Kept) for layer in read_flow(nflows.LIBRARY, flow, "cuda").layers] == [False]
    assert [isinstance(layer, Kept) for layer in read_flow(nflows.LIBRARY, flow, "cpu").layers] == [True]


def test_couplings_of_a_usual_size_are_fused_whatever_their_mask() -> None:
    masks = [1, 20, 39, 7]
    flow = Flow(T.CompositeTransform([lopsided(40, n) for n in masks]), StandardNormal([40]))
    assert sum(steps(convert(flow))) == len(masks)


def test_permutations_of_many_columns_cost_next_to_nothing() -> None:
    """They are gathers, where a trained matrix of as many columns costs more than the whole of a small coupling."""

    def flow_of(between: Callable[[], nn.Module]) -> nf.NormalizingFlow:
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nf.flows.AffineCouplingBlock(nf.nets.MLP([256, 16, 512])), between()]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(512, trainable=False), layers)

    permuted, mixed = flow_of(lambda: nf.flows.Permute(512)), flow_of(lambda: nf.flows.LULinearPermute(512))
    assert accelerate(permuted) and steps(permuted) == [2]
    assert "multiply-adds for each sample; fused it would take" in str(accelerate(mixed)) and not steps(mixed)
