"""Dropout in CouplingFlow: when units are dropped, which ones, and what becomes of it in other forms of a flow."""

import copy
import pickle

import pytest
import torch
from flow_values import error
from torch import nn

from glf_fast import CouplingFlow, FlowEnsemble, backends, use_backend
from glf_fast.fitting import fused
from glf_fast.reference import log_normal

KINDS = {
    "plain": {},
    "separate": {"coupling": "separate", "linear": "permutation"},
    "spline": {"coupling": "spline", "linear": "dense"},
    "reversible": {"reversible": True},
    "residual": {"network": "residual", "hidden": (8, 8), "context_dim": 2},
}


def flow_of(dropout: float = 0.3, **options) -> CouplingFlow:
    """A flow whose networks' last layers are not zero."""
    torch.manual_seed(0)
    flow = CouplingFlow(5, 2, **{"hidden": (16, 16), "dropout": dropout, **options})
    for parameter in flow.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    flow.actnorm_initialized.fill_(1)
    flow._started = True
    return flow


def inputs(flow: CouplingFlow, rows: int = 40) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x, context = torch.randn(rows, 5), torch.randn(rows, 2)
    return (x, context) if flow.context_dim else (x,)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_units_are_dropped_in_training_mode_alone(kind: str, backend: str) -> None:
    if not backends()[backend].startswith("ready"):
        pytest.skip(backends()[backend])
    flow, plain = flow_of(**KINDS[kind]), flow_of(0.0, **KINDS[kind])
    given = inputs(flow)
    with use_backend(backend):
        for method in ("log_prob", "forward", "inverse"):

            def call(flow: CouplingFlow, method: str = method) -> torch.Tensor:
                found = getattr(flow, method)(*given)
                return found if method == "log_prob" else torch.cat([found[0], found[1][:, None]], 1)

            assert torch.equal(call(flow.eval()), call(plain))
            flow.train()
            torch.manual_seed(7)
            a, b = call(flow), call(flow)
            torch.manual_seed(7)
            assert not torch.equal(a, b) and torch.equal(call(flow), a) and torch.equal(call(flow), b)
            with torch.no_grad():
                torch.manual_seed(7)
                assert error(call(flow), a) < 1e-6
        torch.manual_seed(7)
        log_prob = flow.log_prob(*given)
        torch.manual_seed(7)
        z, logdet = flow(*given)
        assert error(log_prob, log_normal(z) + logdet) < 1e-5


def test_eval_mode_leaves_the_generator_alone() -> None:
    for flow in (flow_of().eval(), flow_of(0.0)):
        before = torch.get_rng_state()
        flow.log_prob(torch.zeros(3, 5))
        assert torch.equal(torch.get_rng_state(), before)


def test_the_mean_of_a_step_is_that_of_eval_mode() -> None:
    """The shift is linear in the only hidden layer."""
    flow = flow_of(0.4, hidden=(64,), coupling="additive", linear="permutation").double()
    one = CouplingFlow(5, 1, (64,), coupling="additive", linear="permutation", dropout=0.4).double()
    one.load_state_dict({name: value[:1] for name, value in flow.state_dict().items()})
    x = torch.randn(1, 5, dtype=torch.float64)
    exact, _ = one.eval()(x)
    one.train()
    with torch.no_grad():
        drawn = torch.cat([one(x)[0] for _ in range(2000)])
    spread = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact[0]).abs() <= 4 * spread + 1e-12).all() and spread.max() > 0


def test_it_is_in_every_form_of_the_flow() -> None:
    flow = flow_of(0.25)
    assert flow.config["dropout"] == 0.25 and "dropout=0.25" in repr(flow)
    assert CouplingFlow(**flow.config).config == flow.config
    for copied in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.manual_seed(3)
        a = copied.log_prob(*inputs(flow))
        torch.manual_seed(3)
        assert torch.equal(a, copied.log_prob(*inputs(flow))) and copied.config == flow.config
    state = flow.__getstate__()
    config = {name: value for name, value in flow.config.items() if name != "dropout"}
    older = CouplingFlow.__new__(CouplingFlow)
    older.__setstate__({**state, "config": config})  # of a flow that was pickled before there was any
    assert older.config["dropout"] == 0


@pytest.mark.parametrize("kind", [{}, {"network": "residual", "hidden": (8, 8)}, {"coupling": "separate"}])
def test_layers_have_it_too(kind) -> None:
    flow = flow_of(0.25, **kind)
    layers = flow.to_layers()
    back = CouplingFlow.from_layers(layers)
    assert back.config == flow.config
    x = torch.randn(30, 5)
    assert error(layers.eval().log_prob(x), flow.eval().log_prob(x)) < 1e-5
    layers.train()
    assert not torch.equal(layers.log_prob(x), layers.log_prob(x))
    with pytest.raises(ValueError, match="dropout"):
        CouplingFlow.from_layers(type(layers)([*layers.layers, *flow_of(0.0, **kind).to_layers().layers], (5,)))


def test_members_of_an_ensemble_drop_units_of_their_own() -> None:
    flows = [flow_of(0.5), flow_of(0.5)]
    ensemble = FlowEnsemble.from_flows(flows)
    x = torch.randn(20, 5)
    assert error(ensemble.eval().log_prob(x)[1], flows[1].eval().log_prob(x)) < 1e-5
    ensemble.train()
    torch.manual_seed(4)
    a = ensemble.log_prob(x)
    torch.manual_seed(4)
    assert torch.equal(a, ensemble.log_prob(x)) and not torch.equal(a[0], a[1])
    assert not torch.equal(ensemble.inverse(x)[0], ensemble.inverse(x)[0])


def test_actnorms_start_without_it() -> None:
    started = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        flow = CouplingFlow(5, 2, (16,), dropout=dropout)
        for weight in (*flow.mlp_weights, *flow.mlp_biases):
            nn.init.constant_(weight, 0.1)
        flow.log_prob(*inputs(flow))
        started.append(flow.actnorm_log_scale.detach())
    assert torch.equal(*started)


def test_training_loops_in_cpp_refuse() -> None:
    assert fused.why_not(flow_of(0.1), 10) == "dropout"


@pytest.mark.parametrize("bad", [1.0, -0.1, "a", True, None])
def test_bad_probabilities(bad) -> None:
    with pytest.raises(ValueError, match="dropout must be a number of at least 0, and below 1"):
        CouplingFlow(5, 2, (8,), dropout=bad)


def test_a_compiled_flow_drops_other_units_in_each_call() -> None:
    flow, x = flow_of(0.4), torch.randn(20, 5)
    compiled = torch.compile(lambda x: flow.log_prob(x), fullgraph=True, backend="aot_eager")
    a, b = compiled(x), compiled(x)
    assert not torch.equal(a, b)
    a.sum().backward()
    torch.manual_seed(1)
    first = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first)
    flow.eval()
    assert torch.equal(compiled(x), compiled(x)) and error(compiled(x), flow.log_prob(x)) < 1e-6
