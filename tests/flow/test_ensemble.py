"""FlowEnsemble against its flows one by one: values, gradients, starts, mixtures, copies, states, errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import glf_fast
import glf_fast.ops.flops  # which tells the counter what the kernels do
from glf_fast import CouplingFlow, FlowEnsemble, Spline, ops, use_backend

E, B, D, C = 3, 7, 5, 2
KINDS: dict[str, dict[str, Any]] = {
    "affine": {},
    "separate, dense, without ActNorms": {"coupling": "separate", "linear": "dense", "actnorm": False},
    "additive, permutations": {"coupling": "additive", "linear": "permutation"},
    "splines": {"coupling": "spline", "spline": Spline(4)},
    "residual": {"network": "residual", "hidden": (6, 6), "add_first": True},
    "reversible": {"reversible": True, "activation": "silu"},
    "no hidden layers": {"hidden": ()},
    "six hidden layers": {"hidden": (4,) * 6, "activation": "elu", "activation_constant": 0.5},
}


def shaken(ensemble: FlowEnsemble) -> FlowEnsemble:
    """With parameters away from their start, which the ActNorms have behind them."""
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if ensemble._flows.config["actnorm"]:
        ensemble._flows.actnorm_initialized.fill_(1)
    ensemble._flows._started = True
    return ensemble


def ensemble_of(context_dim: int = C, dtype: torch.dtype = torch.float64, **options: Any) -> FlowEnsemble:
    torch.manual_seed(0)
    return shaken(FlowEnsemble(E, D, 2, **{"hidden": (6,), "context_dim": context_dim, **options})).to(dtype)


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(E, B, D, dtype=dtype), torch.randn(E, B, C, dtype=dtype)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_its_flows_one_by_one(kind: str, backend: str) -> None:
    ensemble = ensemble_of(**KINDS[kind])
    x, context = rows()
    for t in (x, context):
        t.requires_grad_()
    with use_backend(backend):
        z, logdet = ensemble(x, context)
        (z.square().sum((1, 2)) + logdet.square().sum(1)).sum().backward()
        back, undone = ensemble.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(undone, -logdet, rtol=0, atol=1e-9)
    own_x, own_context = (t.detach().clone().requires_grad_() for t in (x, context))
    for e, flow in enumerate(ensemble):
        one, one_logdet = flow(own_x[e], own_context[e])
        (one.square().sum() + one_logdet.square().sum()).backward()
        torch.testing.assert_close(z[e], one)
        torch.testing.assert_close(logdet[e], one_logdet)
        torch.testing.assert_close(ensemble.log_prob(x, context)[e], flow.log_prob(own_x[e], own_context[e]))
        for name, parameter in flow.named_parameters():
            stacked = ensemble._flows.get_parameter(name).grad
            found = None if stacked is None else stacked[2 * e : 2 * e + 2]
            torch.testing.assert_close(found, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(x.grad, own_x.grad)
    torch.testing.assert_close(context.grad, own_context.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_of_one(kind: str) -> None:
    ensemble = shaken(FlowEnsemble(1, D, 2, **{"hidden": (6,), **KINDS[kind]})).eval()
    x = torch.randn(B, D)
    torch.testing.assert_close(ensemble.log_prob(x), ensemble[0].log_prob(x)[None])
    torch.testing.assert_close(ensemble.inverse(ensemble(x)[0])[0][0], x, rtol=1e-3, atol=1e-3)


def test_threads_change_no_bit() -> None:
    """On one thread flow by flow, on two each with a flow of its own, which is work enough for it."""
    ensemble = ensemble_of(hidden=(64, 64), dtype=torch.float32)
    x, context = torch.randn(E, 256, D), torch.randn(E, 256, C)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            ensemble.zero_grad()
            ensemble.log_prob(x, context).sum().backward()
            found.append([p.grad for p in ensemble.parameters()])
    finally:
        torch.set_num_threads(threads)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_shared_rows_and_contexts() -> None:
    ensemble = ensemble_of()
    x, context = (t[0] for t in rows())
    z, logdet = ensemble(x, context[0])
    assert z.shape == (E, B, D) and logdet.shape == (E, B)
    whole = ensemble(x.expand(E, B, D), context[0].expand(E, B, C))
    assert torch.equal(z, whole[0]) and torch.equal(logdet, whole[1])
    assert torch.equal(ensemble(x, context)[0], ensemble(x.expand(E, B, D), context.expand(E, B, C))[0])
    empty, none = ensemble(x[:0], context[:0])
    assert empty.shape == (E, 0, D) and none.shape == (E, 0)


@pytest.mark.parametrize("training", [True, False])
def test_actnorms_start_from_the_rows_of_each_flow(training: bool) -> None:
    torch.manual_seed(0)
    flows = [CouplingFlow(D, 2, (6,)).double() for _ in range(E)]
    ensemble = FlowEnsemble.from_flows(flows).train(training)
    x = torch.randn(E, B, D, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None, None]
    z, _ = ensemble(x)
    for e, flow in enumerate(flows):
        torch.testing.assert_close(z[e], flow.train(training)(x[e])[0])
        assert torch.equal(ensemble[e].actnorm_initialized, flow.actnorm_initialized)


def test_flows_with_frozen_entries_and_factors_come_and_go() -> None:
    torch.manual_seed(0)
    flows = [CouplingFlow(D, 2, (6,), actnorm=False).double() for _ in range(2)]
    trained = torch.rand_like(flows[0].mlp_weights[0]) < 0.5
    flows[0].multiply("mlp_biases.1", torch.tensor(0.1))
    flows[0].hold("mlp_weights.0", trained)
    ensemble = FlowEnsemble.from_flows(flows)
    x = torch.randn(B, D, dtype=torch.float64)
    ensemble.log_prob(x).sum().backward()
    for e, flow in enumerate(flows):
        flow.log_prob(x).sum().backward()
        torch.testing.assert_close(ensemble.log_prob(x)[e], flow.log_prob(x))
        torch.testing.assert_close(ensemble[e].log_prob(x), flow.log_prob(x))
        for name, parameter in flow.named_parameters():
            stacked = ensemble._flows.get_parameter(name).grad
            torch.testing.assert_close(None if stacked is None else stacked[2 * e : 2 * e + 2], parameter.grad)


def test_mixtures() -> None:
    ensemble = ensemble_of(context_dim=0)
    x = rows()[0][0]
    single = ensemble.log_prob(x).detach()
    torch.testing.assert_close(ensemble.mixture_log_prob(x), single.logsumexp(0) - math.log(E))
    w = torch.tensor([3.0, 0.0, 1.0])
    expected = torch.logsumexp(torch.stack([single[0] + math.log(0.75), single[2] + math.log(0.25)]), 0)
    torch.testing.assert_close(ensemble.mixture_log_prob(x, weights=w), expected)
    w = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    ensemble.mixture_log_prob(x, weights=w).sum().backward()
    p, total = single.exp(), (w.detach()[:, None] / 4 * single.exp()).sum(0)
    torch.testing.assert_close(w.grad, ((p - total) / (4 * total)).sum(1))
    generator = torch.Generator().manual_seed(0)
    only = ensemble.mixture_sample(50, weights=torch.tensor([0.0, 1.0, 0.0]), generator=generator)
    generator.manual_seed(0)
    torch.multinomial(torch.ones(3), 50, replacement=True, generator=generator)
    assert only.shape == (50, D) and torch.equal(only, ensemble.sample(50, generator=generator)[1])
    assert ensemble.mixture_sample(0).shape == (0, D) and ensemble.sample(0).shape == (E, 0, D)
    assert torch.equal(ensemble.sample(4, temperature=0)[:, 0], ensemble.sample(4, temperature=0)[:, 3])


def test_samples_of_a_mixture_have_their_own_contexts() -> None:
    """Each flow only shifts its noise, by the context and a number of its own."""
    flows = []
    for e in range(2):
        flow = CouplingFlow(2, 1, (1,), context_dim=1, coupling="additive", linear="permutation", actnorm=False)
        for tensor in (*flow.mlp_weights, *flow.mlp_biases):
            nn.init.zeros_(tensor)
        nn.init.ones_(flow.mlp_weights[0][0, 1])  # the context
        nn.init.ones_(flow.mlp_weights[1])
        nn.init.constant_(flow.mlp_biases[1], 1000.0 * e)
        flows.append(flow)
    context = 10 * torch.arange(1.0, 101)[:, None]
    drawn = FlowEnsemble.from_flows(flows).mixture_sample(100, context, generator=torch.Generator().manual_seed(0))
    shift = -drawn[:, 1] if drawn[:, 1].abs().max() > 100 else -drawn[:, 0]
    of_second = shift - context[:, 0] > 500
    assert (shift - context[:, 0] - 1000 * of_second).abs().max() < 6 and 30 < of_second.sum() < 70


def test_what_is_frozen_stays_frozen() -> None:
    flows = [CouplingFlow(D, 2, (6,), actnorm=False) for _ in range(2)]
    flows[0].requires_grad_(False)
    flows[0].multiply("mlp_biases.0", torch.tensor(0.1))
    ensemble = FlowEnsemble.from_flows(flows)
    x = torch.randn(B, D)
    ensemble.log_prob(x).sum().backward()
    for name, parameter in ensemble._flows.named_parameters():
        assert parameter.grad is not None and not parameter.grad[:2].any(), name
    assert any(p.grad[2:].any() for p in ensemble.parameters() if p.grad is not None)
    torch.testing.assert_close(ensemble.log_prob(x)[0], flows[0].log_prob(x))


@pytest.mark.parametrize("context_dim", [0, C])
def test_an_empty_part_of_the_first_batch_asks_all_flows(context_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process has it whose part of the batch is empty: the others wait for as many answers as there are flows."""
    ensemble = FlowEnsemble(E, D, 2, (6,), context_dim)
    asked: list[int] = []
    monkeypatch.setattr(ensemble._flows, "_start_steps", lambda steps, x, context: asked.append(len(x)) or True)
    ensemble._flows._start(torch.zeros(0, D), torch.zeros(0, C) if context_dim else None, E)
    assert asked == [0] * E


def test_copies_states_and_compilation() -> None:
    ensemble = ensemble_of()
    x, context = rows()
    expected = ensemble.log_prob(x, context)
    assert torch.equal(copy.deepcopy(ensemble).log_prob(x, context), expected)
    torch.manual_seed(5)
    other = FlowEnsemble(**ensemble.config).double()
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other.log_prob(x, context), expected)
    assert torch.equal(FlowEnsemble.from_flows(list(ensemble)).log_prob(x, context), expected)
    compiled = torch.compile(ensemble, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, context)[0], ensemble(x, context)[0])


def test_second_derivatives() -> None:
    ensemble = shaken(FlowEnsemble(2, 3, 1, (4,), activation="tanh", actnorm=False).double())
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ensemble.log_prob(x), (x,))


def test_counts_operations_of_each_flow_once() -> None:
    ensemble = ensemble_of(dtype=torch.float32)
    x, context = rows(torch.float32)
    counts = []
    flows = list(ensemble)
    for run in (lambda: ensemble(x, context), lambda: [flow(x[0], context[0]) for flow in flows]):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def pruned() -> CouplingFlow:
    flow = CouplingFlow(4, 1, (6,))
    prune.random_unstructured(flow.mlp_weights, "0", 0.5)
    return flow


ERRORS: dict[str, Any] = {
    "members must be ≥ 1": lambda: FlowEnsemble(0, 4),
    "members must be an int": lambda: FlowEnsemble("2", 4),  # type: ignore[arg-type]
    "an ensemble has one or more flows": lambda: FlowEnsemble.from_flows([]),
    "flow 0 is a Linear": lambda: FlowEnsemble.from_flows([torch.nn.Linear(1, 1)]),  # type: ignore[list-item]
    "flow 1 has steps=3 but flow 0 has 2": lambda: FlowEnsemble.from_flows([CouplingFlow(4, 2), CouplingFlow(4, 3)]),
    "x must have shape": lambda: ensemble_of()(torch.zeros(2, B, D)),
    "x must be a torch.Tensor": lambda: ensemble_of()([1.0]),
    "give a context": lambda: ensemble_of()(torch.zeros(B, D)),
    "the context must have shape": lambda: ensemble_of()(torch.zeros(B, D), torch.zeros(B + 1, C)),
    "none, because context_dim is 0": lambda: ensemble_of(0)(torch.zeros(B, D), torch.zeros(C)),
    "this ensemble has 3 flows; got index 3": lambda: ensemble_of()[3],
    "flow 1 has dtype=torch.float64": lambda: FlowEnsemble.from_flows(
        [CouplingFlow(4, 1), CouplingFlow(4, 1).double()]
    ),
    "flow 1 has training=False": lambda: FlowEnsemble.from_flows([CouplingFlow(4, 1), CouplingFlow(4, 1).eval()]),
    "flow 0 has no tensor mlp_weights.0: it is parametrized": lambda: FlowEnsemble.from_flows([pruned()]),
    "x of a mixture must have shape": lambda: ensemble_of(0).mixture_log_prob(torch.zeros(E, B, D)),
    "the context of a mixture must be": lambda: ensemble_of().mixture_sample(B, torch.zeros(E, B, C)),
    "weights must be 3 finite numbers": lambda: ensemble_of(0).mixture_log_prob(
        torch.zeros(B, D, dtype=torch.float64), weights=torch.zeros(3)
    ),
    "n must be ≥ 0": lambda: ensemble_of(0).sample(-1),
    "temperature must be ≥ 0": lambda: ensemble_of(0).sample(1, temperature=-1),
    "2 members have equally many steps and rows; got 3 steps": lambda: ops.coupling_flow(
        torch.zeros(4, 2),
        torch.zeros(3, 2, 2),
        torch.zeros(3, 2),
        [torch.zeros(3, 1, 2)],
        [torch.zeros(3, 2)],
        members=2,
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_is_wrong(message: str) -> None:
    with pytest.raises((ValueError, TypeError, IndexError), match=message.replace("(", r"\(")):
        ERRORS[message]()


def test_is_public_and_says_what_it_is() -> None:
    assert repr(FlowEnsemble(3, 5, steps=4)).startswith("FlowEnsemble(members=3, dim=5, steps=4, hidden=(256, 256)")
    assert glf_fast.FlowEnsemble is FlowEnsemble and "FlowEnsemble" in glf_fast.__all__
