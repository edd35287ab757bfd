"""accelerate: the same model, the same numbers, fewer launches; training goes on; what stays is named."""

import copy
import io
from functools import partial

import FrEIA.framework as ff
import FrEIA.modules as fm
import nflows.distributions
import nflows.flows
import nflows.nn.nets
import nflows.transforms as nt
import normflows as nf
import pytest
import torch
import zuko
from nflows_couplings import Net, alternating
from torch import nn

from glf_fast.conversion import convert
from glf_fast.conversion.accelerate import accelerate
from glf_fast.flow import CouplingFlow


def mlp(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, n_out))


def randomized(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p) / max(1, p.shape[-1]) ** 0.5)
    return module


def coupling_block(dim):
    half = dim - dim // 2
    return nf.flows.AffineCouplingBlock(mlp(half, 2 * (dim - half)))


def normflows_flow(dim=6, steps=3):
    layers = [layer for _ in range(steps) for layer in (coupling_block(dim), nf.flows.Permute(dim, "swap"))]
    return randomized(nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), layers))


def nflows_flow(dim=5, context=2, steps=3):
    couplings = alternating(dim, steps, lambda n_in, n_out: Net(n_in + context, n_out, (12, 12), nn.ReLU()))
    transforms = [t for coupling in couplings for t in (coupling, nt.LULinear(dim))]
    composite = nt.CompositeTransform([nt.PointwiseAffineTransform(0.5, 2.0), nt.CompositeTransform(transforms)])
    return randomized(nflows.flows.Flow(composite, nflows.distributions.StandardNormal([dim]), nn.Linear(3, context)))


def zuko_flow(dim=5, context=2):
    return randomized(zuko.flows.RealNVP(dim, context, transforms=3, hidden_features=(12, 12)))


def freia_net(dim=5, condition=3):
    inn = ff.SequenceINN(dim)
    for _ in range(2):
        inn.append(fm.AllInOneBlock, cond=1, cond_shape=(condition,), subnet_constructor=mlp)
        inn.append(fm.PermuteRandom)
    return randomized(inn)


def trains(loss, parameters):
    """Five steps of Adam lower the loss and change every parameter that is trained."""
    parameters = [p for p in parameters if p.requires_grad]
    before, values = loss().item(), [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, 1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before
    assert all(not torch.equal(p, v) for p, v in zip(parameters, values, strict=True))


def double(given):
    """Tensors in float64, in lists, too."""
    if isinstance(given, (list, tuple)):
        return type(given)(map(double, given))
    return given.double() if isinstance(given, torch.Tensor) else given


def same(call, fast, original, *inputs, tolerance=1e-4):
    """The same results: ours in float32, the original's in float64."""
    got, want = call(fast, *inputs), call(original, *double(inputs))
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
    return got


class VAE(nn.Module):
    """With a flow as its prior."""

    def __init__(self, prior):
        super().__init__()
        self.encoder, self.decoder, self.prior = nn.Linear(10, 12), nn.Linear(6, 10), prior

    def forward(self, x, noise):
        mean, log_std = self.encoder(x).chunk(2, 1)
        z = mean + noise * log_std.exp()
        return (self.decoder(z) - x).square().sum(1) - log_std.sum(1) - self.prior.log_prob(z)


def test_vae_with_a_normflows_prior():
    torch.manual_seed(0)
    model = VAE(normflows_flow())
    original = copy.deepcopy(model).double()
    report = accelerate(model)
    assert "prior" in str(report) and "1 CouplingFlow\n" in str(report)
    (replaced,) = report.replaced
    assert (replaced.couplings, replaced.flows) == (3, 1) and not report.left
    assert type(model.prior) is nf.NormalizingFlow and len(model.prior.flows) == 1
    assert all(module.training for module in model.modules())
    x, noise, z = torch.randn(20, 10), torch.randn(20, 6), torch.randn(20, 6)
    same(VAE.__call__, model, original, x, noise)
    for name in ("forward_kld", "inverse", "forward"):
        same(lambda flow, z, name=name: getattr(flow, name)(z), model.prior, original.prior, z)
    sample, log_q = model.prior.sample(50)
    torch.testing.assert_close(log_q, model.prior.log_prob(sample), rtol=1e-3, atol=1e-3)
    trains(lambda: model(x, noise).mean(), model.parameters())


def test_nflows_flow_in_a_larger_module():
    torch.manual_seed(1)
    model = nn.ModuleDict({"estimators": nn.ModuleList([nflows_flow()]), "other": nn.Linear(2, 2)})
    original = copy.deepcopy(model["estimators"][0]).double()
    (replaced,) = accelerate(model).replaced
    assert replaced.where == "estimators.0" and replaced.first == "_transform._transforms.0"
    assert (replaced.couplings, replaced.flows) == (3, 1)
    flow = model["estimators"][0]
    x, context = torch.randn(20, 5), torch.randn(20, 3)
    for name in ("log_prob", "transform_to_noise"):
        same(lambda flow, x, c, name=name: getattr(flow, name)(x, c), flow, original, x, context)
    assert flow.sample(4, context).shape == (20, 4, 5)
    trains(lambda: -flow.log_prob(x, context).mean(), flow.parameters())


def test_zuko_flow():
    torch.manual_seed(2)
    flow = zuko_flow()
    original = copy.deepcopy(flow).double()
    report = accelerate(flow)
    assert report and report.replaced[0].where == "the model" and type(flow) is zuko.flows.RealNVP
    context = torch.randn(3, 2)
    log_prob = lambda flow, x, c: flow(c).log_prob(x)  # noqa: E731
    same(log_prob, flow, original, torch.randn(4, 3, 5), context)
    x, got = flow(context).rsample_and_log_prob((7,))
    assert x.shape == (7, 3, 5)
    torch.testing.assert_close(got, same(log_prob, flow, original, x, context, tolerance=1e-3), rtol=1e-3, atol=1e-3)
    same(log_prob, flow, original, x[:, 0], context[0], tolerance=1e-3)  # one context for many samples
    x = torch.randn(3, 5)
    trains(lambda: -flow(context).log_prob(x).mean(), flow.parameters())


def test_nflows_caches_and_a_context_that_no_layer_uses():
    layers = [*alternating(5, 1, partial(Net, ignores=True)), nt.LULinear(5, using_cache=True)]
    transform = nt.CompositeTransform(layers)
    flow = randomized(nflows.flows.Flow(transform, nflows.distributions.StandardNormal([5]))).eval()
    x, context = torch.randn(20, 5), torch.randn(20, 3)
    with torch.no_grad():
        want = flow.log_prob(x, context)  # fills the caches, with float32
    assert accelerate(flow).replaced[0].flows == 1
    torch.testing.assert_close(flow.log_prob(x, context), want, rtol=1e-4, atol=1e-4)
    assert flow.sample(2, context).shape == (20, 2, 5)


class AnomalyDetector(nn.Module):
    def __init__(self, inn):
        super().__init__()
        self.features, self.inn = nn.Linear(8, 5), inn

    def forward(self, x, condition):
        z, jac = self.inn(self.features(x), c=[None, condition])
        return 0.5 * z.square().sum(1) - jac


def run(inn, x, conditions, rev=False):
    return inn(x, c=conditions, rev=rev)


def test_freia_network_in_an_anomaly_detector():
    torch.manual_seed(3)
    model = AnomalyDetector(freia_net())
    original = copy.deepcopy(model).double()
    report = accelerate(model)
    assert report.replaced[0].where == "inn" and report.replaced[0].couplings == 2
    assert type(model.inn) is ff.SequenceINN and len(model.inn) == 1 and model.inn.conditions == [1]
    x, condition = torch.randn(20, 8), torch.randn(20, 3)
    same(AnomalyDetector.__call__, model, original, x, condition)
    same(run, model.inn, original.inn, torch.randn(20, 5), [None, condition], True)
    trains(lambda: model(x, condition).mean(), model.parameters())


def test_freia_graph_keeps_its_nodes():
    torch.manual_seed(4)
    start, condition = ff.InputNode(6), ff.ConditionNode(2)
    a = ff.Node(start, fm.PermuteRandom, {})
    b = ff.Node(a, fm.GLOWCouplingBlock, {"subnet_constructor": mlp}, conditions=condition)
    c = ff.Node(b, fm.GINCouplingBlock, {"subnet_constructor": mlp}, conditions=condition)
    d = ff.Node(c, fm.NICECouplingBlock, {"subnet_constructor": mlp})
    inn = randomized(ff.GraphINN([start, condition, a, b, c, d, ff.OutputNode(d)]))
    original = copy.deepcopy(inn).double()
    report = accelerate(inn)
    assert [r.couplings for r in report.replaced] == [2, 2]
    assert "GINCouplingBlock" in report.left[0].reason
    for rev in (False, True):
        same(run, inn, original, torch.randn(20, 6), [torch.randn(20, 2)], rev)


def test_freia_runs_end_where_the_condition_changes():
    torch.manual_seed(5)
    inn = ff.SequenceINN(4)
    for index, width in ((0, 2), (None, 0), (0, 2), (1, 3)):
        given = {} if index is None else {"cond": index, "cond_shape": (width,)}
        inn.append(fm.GLOWCouplingBlock, subnet_constructor=mlp, **given)
    randomized(inn)
    original = copy.deepcopy(inn).double()
    report = accelerate(inn)
    assert [(r.first, r.last) for r in report.replaced] == [
        ("module_list.0", "module_list.2"),
        ("module_list.3", "module_list.3"),
    ]
    same(run, inn, original, torch.randn(9, 4), [torch.randn(9, 2), torch.randn(9, 3)])


def test_layers_that_are_kept_between_couplings_stay():
    torch.manual_seed(6)
    spline = nf.flows.CircularAutoregressiveRationalQuadraticSpline(6, 1, 8, [1])
    layers = [coupling_block(6), coupling_block(6), spline, nf.flows.LULinearPermute(6), coupling_block(6)]
    flow = randomized(nf.NormalizingFlow(nf.distributions.DiagGaussian(6), layers))
    original = copy.deepcopy(flow).double()
    report = accelerate(flow)
    assert [r.couplings for r in report.replaced] == [1, 2] and len(flow.flows) == 3 and flow.flows[1] is spline
    assert "flows.2 (CircularAutoregressiveRationalQuadraticSpline)" in str(report)
    x = torch.randn(20, 6)
    same(lambda flow, x: flow.log_prob(x), flow, original, x)
    trains(lambda: flow.forward_kld(x), flow.parameters())


def test_what_is_used_elsewhere_stays():
    flow = normflows_flow()
    net = flow.flows[2].flows[1].param_map
    model = nn.ModuleDict({"flow": flow, "net": net})
    report = accelerate(model)
    assert [r.couplings for r in report.replaced] == [1, 1] and "used elsewhere" in report.left[0].reason
    assert flow.flows[1].flows[1].param_map is net
    # A layer itself, under another name.
    flow = normflows_flow()
    model = nn.ModuleDict({"flow": flow, "last": flow.flows[0]})
    assert accelerate(model).replaced[0].couplings == 2 and flow.flows[0] is model["last"]
    # The same flow in two places is one flow: it is replaced once, for both.
    flow = normflows_flow()
    model = nn.ModuleList([VAE(flow), VAE(flow)])
    assert len(accelerate(model).replaced) == 1
    assert model[0].prior is model[1].prior and isinstance(model[1].prior.flows[0].flow, nn.Module)


def test_one_layer_used_twice_stays():
    flow = normflows_flow()
    flow.flows[4] = flow.flows[0]
    report = accelerate(flow)
    assert len(report.replaced) == 1 and report.replaced[0].couplings == 1
    assert sum("shares parameters" in left.reason for left in report.left) == 2


@pytest.mark.parametrize("of", ["layer", "gradient", "parameter"])
def test_hooks_are_not_lost(of):
    flow = normflows_flow()
    if of == "layer":
        flow.flows[0].register_forward_hook(lambda *_: None)
    elif of == "gradient":
        flow.flows[0].register_full_backward_pre_hook(lambda *_: None)
    else:
        next(flow.flows[0].parameters()).register_hook(lambda g: 2 * g)
    report = accelerate(flow)
    assert report.replaced[0].couplings == 2 and "has hooks" in report.left[0].reason


def test_frozen_parameters_stay_frozen():
    flow = normflows_flow()
    flow.flows[0].requires_grad_(False)  # one of three
    frozen = normflows_flow().requires_grad_(False)
    accelerate(flow)
    accelerate(frozen)
    assert all(not p.requires_grad for p in frozen.parameters())
    fused = next(m for m in flow.modules() if isinstance(m, CouplingFlow))
    x = torch.randn(30, 6)
    before = [t.clone() for t in fused._mlp()[0]]
    optimizer = torch.optim.AdamW([p for p in flow.parameters() if p.requires_grad], 1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        flow.forward_kld(x).backward()
        optimizer.step()
    for old, new in zip(before, fused._mlp()[0], strict=True):
        # The first coupling in the library's list is the last one data → noise.
        assert torch.equal(old[-1], new[-1]) and not torch.equal(old[0], new[0])


def test_dtype_mode_and_optimizer():
    flow = normflows_flow().double().eval()
    old = list(flow.parameters())
    report = accelerate(flow)
    assert "Optimizers created before" in str(report)
    assert all(p.dtype == torch.float64 for p in flow.parameters())
    assert not any(module.training for module in flow.modules())
    assert not any(p is q for p in flow.flows.parameters() for q in old)
    assert any(p is flow.q0.loc for p in old)


def test_uninitialised_actnorm_stays_until_it_has_seen_data():
    flow = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(6), [coupling_block(6), nf.flows.ActNorm(6), coupling_block(6)]
    )
    accelerated = copy.deepcopy(flow)
    report = accelerate(accelerated)
    assert [r.couplings for r in report.replaced] == [1, 1] and "has not been initialised" in str(report)
    accelerated.log_prob(3 + torch.randn(50, 6))  # initialises what it kept
    flow.log_prob(3 + torch.randn(50, 6))
    (replaced,) = accelerate(flow).replaced
    assert replaced.couplings == 2


def test_nothing_to_replace():
    report = accelerate(nn.Linear(2, 2))
    assert not report and str(report).startswith("Nothing was replaced.")
    flow = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(4), [nf.flows.CircularAutoregressiveRationalQuadraticSpline(4, 1, 8, [1])]
    )
    report = accelerate(flow)
    assert not report and "CircularAutoregressiveRationalQuadraticSpline" in str(report)
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [nf.flows.Permute(4)])
    assert "no coupling" in str(accelerate(flow))
    # A layer that no flow holds, once, and not what is in it.
    composite = nt.CompositeTransform([nt.LULinear(3), nt.LULinear(3)])
    (left,) = accelerate(nn.ModuleDict({"net": mlp(2, 2), "alone": composite})).left
    assert left.where == "alone" and "not in a flow" in left.reason


@pytest.mark.parametrize("build", [normflows_flow, nflows_flow, zuko_flow, freia_net])
def test_another_default_device(build):
    """As `torch.set_default_device("cuda")`, which a machine without a GPU cannot have."""
    flow = randomized(build())
    torch.set_default_device("meta")
    try:
        converted, report = convert(flow), accelerate(flow)
    finally:
        torch.set_default_device(None)
    assert report
    for tensor in (*converted.state_dict().values(), *flow.state_dict().values()):
        assert tensor.device.type == "cpu"


@pytest.mark.parametrize("build", [normflows_flow, nflows_flow, zuko_flow, freia_net])
def test_twice_copied_and_saved(build):
    """Accelerating again changes nothing; copies are independent; a state_dict loads into another one's."""
    torch.manual_seed(7)
    model, other = build(), build()
    accelerate(model)
    again = accelerate(model)
    assert not again.replaced and all("fused before" in left.reason for left in again.left)
    clone = copy.deepcopy(model)
    accelerate(other)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.ones_like(p))
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    other.load_state_dict(torch.load(saved))
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    torch.save(model, saved := io.BytesIO())
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    assert any(bool(p.any()) for p in model.parameters())
