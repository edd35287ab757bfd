"""Spline couplings of nflows, normflows and zuko: converted, and replaced in place with whatever network they have."""

import copy
import warnings
from collections.abc import Callable, Iterator

import nflows.distributions
import nflows.flows
import nflows.nn.nets
import nflows.transforms as nt
import normflows as nf
import pytest
import torch
import zuko
from torch import Tensor, nn
from zuko.flows.coupling import GeneralCouplingTransform

from glf_fast import CouplingFlow, SplineCoupling, accelerate, convert

D, C = 5, 2


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """nflows warns of networks that do not say their width."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    """An MLP on [p, context]."""

    def __init__(self, n_in: int, n_out: int, context: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_in + context, 12), nn.Tanh(), nn.Linear(12, n_out))
        self.context_features = context or None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(x if context is None else torch.cat([x, context], 1))


def residual(n_in: int, n_out: int, context: int = 0, **options) -> nn.Module:
    return nflows.nn.nets.ResidualNet(n_in, n_out, 8, context_features=context or None, **options)


def nflows_flow(net: Callable[..., nn.Module], *, masks: int = 2, steps: int = 3, **options) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(steps):
        mask = (torch.arange(D) + i) % masks == 0
        layers += [
            nt.PiecewiseRationalQuadraticCouplingTransform(
                mask.int(), net, **{"num_bins": 4, "tails": "linear", "tail_bound": 3.0, **options}
            ),
            nt.RandomPermutation(D),
        ]
    return nflows.flows.Flow(nt.CompositeTransform(layers), nflows.distributions.StandardNormal([D]))


def normflows_flow() -> nn.Module:
    layers = [
        layer
        for _ in range(2)
        for layer in (nf.flows.CoupledRationalQuadraticSpline(D, 1, 8, num_bins=4), nf.flows.Permute(D))
    ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(D, trainable=False), layers)


def zuko_flow(context: int = 0, **options) -> nn.Module:
    kind = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(4,), (4,), (3,)], **options}
    masks = [torch.arange(D) % 2 == i % 2 for i in range(3)]
    transforms = [GeneralCouplingTransform(D, context, mask, hidden_features=(12, 12), **kind) for mask in masks]
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(D), torch.ones(D), buffer=True
    )
    return zuko.flows.Flow(transforms, base)


FLOWS: dict[str, tuple[Callable[[], nn.Module], int, set[type]]] = {  # flow, context, what it becomes
    "nflows": (lambda: nflows_flow(Net), 0, {CouplingFlow}),
    "nflows with a context": (lambda: nflows_flow(lambda a, b: Net(a, b, C)), C, {CouplingFlow}),
    "nflows, uneven": (lambda: nflows_flow(Net, masks=3), 0, {CouplingFlow}),
    "nflows, passive splines": (
        lambda: nflows_flow(Net, apply_unconditional_transform=True), 0, {CouplingFlow, SplineCoupling}
    ),
    "nflows, batch norm": (
        lambda: nflows_flow(lambda a, b: residual(a, b, C, use_batch_norm=True)), C, {SplineCoupling}
    ),
    "nflows, residual": (lambda: nflows_flow(residual), 0, {CouplingFlow}),
    "nflows, residual with a context": (lambda: nflows_flow(lambda a, b: residual(a, b, C)), C, {CouplingFlow}),
    "normflows": (normflows_flow, 0, {CouplingFlow, SplineCoupling}),  # those of passive columns
    "zuko": (zuko_flow, 0, {CouplingFlow}),
    "zuko with a context": (lambda: zuko_flow(C), C, {CouplingFlow}),
    "zuko, normalized": (lambda: zuko_flow(normalize=True), 0, {SplineCoupling}),
    "zuko, CELU, with a context": (lambda: zuko_flow(C, activation=nn.CELU), C, {SplineCoupling}),
}  # fmt: skip


def shaken(flow: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return flow


def log_prob(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    if isinstance(flow, zuko.flows.Flow):
        return flow(context).log_prob(x)
    return flow.log_prob(x) if context is None else flow.log_prob(x, context)


@pytest.mark.parametrize("name", FLOWS)
def test_converted_and_replaced_in_place(name: str) -> None:
    make, C, kinds = FLOWS[name]
    flow = shaken(make()).double().eval()
    x, context = 2 * torch.randn(40, D).double(), torch.randn(40, C).double() if C else None
    want = log_prob(flow, x, context)
    converted = convert(flow)
    torch.testing.assert_close(converted.log_prob(x, context), want, rtol=1e-9, atol=1e-9)
    z, logdet = converted(x, context)
    back, logdet_back = converted.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(logdet_back, -logdet, rtol=1e-7, atol=1e-7)
    in_place = copy.deepcopy(flow)
    report = accelerate(in_place)
    assert report and not report.left, report
    found = {type(m) for m in in_place.modules() if isinstance(m, CouplingFlow | SplineCoupling)}
    assert found == kinds
    torch.testing.assert_close(log_prob(in_place, x, context), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FLOWS)
def test_trains_as_the_original_does(name: str) -> None:
    """Adam's steps are of what is stored: parameters of widths and heights are divided by √hidden at use, not before."""
    make, C, _ = FLOWS[name]
    flow = shaken(make()).double()
    fused = copy.deepcopy(flow)
    assert accelerate(fused)
    losses: list[list[float]] = []
    for model in (flow, fused):
        generator = torch.Generator().manual_seed(3)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        model.train()
        losses.append([])
        for _ in range(20):
            x = 1.5 * torch.randn(64, D, generator=generator).double()
            context = torch.randn(64, C, generator=generator).double() if C else None
            loss = -log_prob(model, x, context).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] and losses[1] == pytest.approx(losses[0], rel=1e-8)


def test_the_kind_of_spline_comes_from_the_object() -> None:
    flow = nflows_flow(Net, steps=1, min_bin_width=2e-3, min_derivative=0.1, tail_bound=2.0)
    (stacked,) = [m for m in convert(shaken(flow)).modules() if isinstance(m, CouplingFlow)]
    kind = stacked.config["spline"]
    assert (kind["low"], kind["high"], kind["min_width"], kind["min_derivative"]) == (-2.0, 2.0, 2e-3, 0.1)
    assert kind["bins"] == 4 and kind["scale"] == 1.0 and kind["parametrization"] == "nflows"
    with_width = nflows_flow(residual, steps=1)
    (layer,) = [m for m in convert(shaken(with_width)).modules() if isinstance(m, SplineCoupling)] or [None]
    scale = layer.spline.scale if layer else None
    if layer is None:  # its network is in the kernels, too
        (stacked,) = [m for m in convert(with_width).modules() if isinstance(m, CouplingFlow)]
        scale = stacked.config["spline"]["scale"]
    assert scale == pytest.approx(8**-0.5)


def test_splines_of_passive_channels_stay() -> None:
    """The couplings beside them are replaced."""
    net = lambda a, b: nn.Conv2d(a, b, 3, padding=1)  # noqa: E731

    class Given(nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.net = net(a, b)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.net(x)

    mask = torch.tensor([0, 1, 0, 1])
    spline = nt.PiecewiseRationalQuadraticCouplingTransform(
        mask, Given, num_bins=4, tails="linear", tail_bound=3.0, apply_unconditional_transform=True, img_shape=[4, 4]
    )
    layers = [nt.AffineCouplingTransform(mask, Given), spline, nt.AffineCouplingTransform(mask, Given)]
    flow = nflows.flows.Flow(nt.CompositeTransform(layers), nflows.distributions.StandardNormal([4, 4, 4]))
    flow = shaken(flow).double().eval()
    x = torch.randn(3, 4, 4, 4).double()
    want = flow.log_prob(x)
    torch.testing.assert_close(convert(flow).log_prob(x), want, rtol=1e-9, atol=1e-9)
    report = accelerate(flow)
    assert sum(r.couplings for r in report.replaced) == 2 and "passive channels" in str(report)
    torch.testing.assert_close(flow.log_prob(x), want, rtol=1e-9, atol=1e-9)


def test_what_is_not_covered_says_why() -> None:
    """nflows' splines without tails raise an error outside of their box, which a fused flow would not."""
    for options, reason in (
        ({"tails": None, "tail_bound": 1.0}, "tails None"),
        ({"num_bins": 40}, "bins must be 2 to 32, an int; got 40"),
    ):
        flow = nflows_flow(Net, steps=1, **options)
        report = accelerate(flow)
        assert not report and reason in str(report)


def test_active_dropout_goes_on() -> None:
    """A network whose active dropout no fused one has stays the library's own, and drops the same units."""
    flow = nflows_flow(lambda n_in, n_out: residual(n_in, n_out, dropout_probability=0.4)).train()
    for layer in (module for module in flow.modules() if hasattr(module, "blocks")):
        layer.blocks[0].dropout.p = 0.2
    fast = copy.deepcopy(flow)
    report = accelerate(fast)
    assert report.replaced[0].into["SplineCoupling"] == 3 and not report.replaced[0].lost
    x = torch.randn(7, D)
    found = []
    for module in (flow, fast):
        torch.manual_seed(1)
        found.append(module.log_prob(x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert not torch.equal(fast.log_prob(x), fast.log_prob(x))
    torch.testing.assert_close(fast.eval().log_prob(x), flow.eval().log_prob(x), rtol=1e-4, atol=1e-4)
