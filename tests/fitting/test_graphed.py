"""Steps that only the device follows: on a processor, where nothing captures them, they are those of an ordinary loop."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glf_fast import AutoregressiveFlow, CouplingFlow, Flow, GraphedStep
from glf_fast.fitting.dataset import Rows
from glf_fast.fitting.graphed import CapturedStep, DeviceStep, GraphedSteps, why_not
from glf_fast.fitting.steps import Steps, adamw

ROWS, BATCH, STEPS = 60, 12, 7
FLOWS: dict[str, Callable[[], Flow]] = {
    "plu": lambda: CouplingFlow(5, 3, (12, 9)),
    "context": lambda: CouplingFlow(5, 3, (12, 9), context_dim=3, activation="silu", log_scale="glow"),
    "dense": lambda: CouplingFlow(5, 2, (8,), linear="dense", actnorm=False),
    "reversible": lambda: CouplingFlow(5, 2, (8,), reversible=True),
    "spline": lambda: CouplingFlow(5, 2, (8,), coupling="spline", context_dim=2),
    "masked": lambda: AutoregressiveFlow(5, 2, (8,), context_dim=2),
}


def made(name: str) -> Flow:
    torch.manual_seed(0)
    flow = FLOWS[name]().double()
    with torch.no_grad():
        for key, parameter in flow.named_parameters():
            if "actnorm" not in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if name == "dense":
        flow.mlp_weights[1].requires_grad_(False)
    return flow.train()


def rows_of(flow: Flow, weighted: bool = True) -> Rows:
    g = torch.Generator().manual_seed(5)
    x = 1 + torch.randn(ROWS, *flow.event_shape, generator=g, dtype=torch.float64).exp()
    context = torch.randn(ROWS, *flow.context_shape, generator=g, dtype=torch.float64) if flow.context_shape else None
    return Rows(x, context, torch.rand(ROWS, generator=g, dtype=torch.float64) if weighted else None)


ORDER = torch.stack([torch.randperm(ROWS, generator=torch.Generator().manual_seed(k))[:BATCH] for k in range(STEPS)])
RATES = [0.01 / (1 + k) for k in range(STEPS)]


def ordinary(flow: Flow, rows: Rows, clip: float, order: Tensor = ORDER) -> tuple[list[float], torch.optim.AdamW, str]:
    optimizer = adamw(flow, 1.0, 0.1)
    steps, losses, wrong = Steps(flow, optimizer, rows, clip), [], ""
    for k in range(len(order)):
        found, wrong = steps.run(order[k:], RATES[k:])
        losses += found
        if wrong:
            break
    return losses, optimizer, wrong


def assert_same(a: tuple[Flow, torch.optim.Optimizer], b: tuple[Flow, torch.optim.Optimizer], exact: bool) -> None:
    """Flows and states of optimizers."""
    tolerance: dict[str, float] = {"atol": 0, "rtol": 0} if exact else {"atol": 1e-12, "rtol": 1e-12}
    for name, value in a[0].state_dict().items():
        torch.testing.assert_close(b[0].state_dict()[name], value, **tolerance)
    states = [optimizer.state_dict()["state"] for _, optimizer in (a, b)]
    assert states[0].keys() == states[1].keys() and states[0]
    for key, state in states[0].items():
        for name, value in state.items():
            torch.testing.assert_close(states[1][key][name], value, **tolerance)


def all_steps(steps: GraphedSteps, order: Tensor, rates: list[float]) -> tuple[list[list[float]], str]:
    """The losses of each call, and what was not finite."""
    found: list[list[float]] = []
    wrong, done = "", 0
    while done < len(order) and not wrong:
        losses, wrong = steps.run(order[done:], rates[done:])
        found.append(losses)
        done += len(losses)
    return found, wrong


@pytest.mark.parametrize("clip", [0.5, math.inf], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_device_s_steps_are_those_of_a_loop(name: str, clip: float) -> None:
    want, rows = made(name), rows_of(FLOWS[name]())
    losses, optimizer, _ = ordinary(want, rows, clip)
    flow = made(name)
    step = DeviceStep(flow, adamw(flow, 1.0, 0.1), rows, clip, STEPS, BATCH)
    step.order.copy_(ORDER)
    step.rates.copy_(torch.tensor(RATES, dtype=torch.float64))
    for _ in range(STEPS):
        step.run()
    assert int(step.made) == STEPS and step.losses.tolist() == pytest.approx(losses, rel=1e-12)
    assert_same((want, optimizer), (flow, step.optimizer), exact=False)
    group = step.optimizer.param_groups[0]
    assert (group["lr"], group["capturable"]) == (1.0, False)


@pytest.mark.filterwarnings("ignore:glf_fast. steps go through Python:RuntimeWarning")  # there is no graph here
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_repeated(what: str) -> None:
    bad, rows = 3, rows_of(FLOWS["plu"]())
    alone = next(r for r in range(ROWS) if r in ORDER[bad] and r not in ORDER[:bad])
    assert rows.weights is not None
    # A loss of 0 · ∞ is NaN; one of 1e300 is finite, unlike the square of its gradient.
    rows.weights[alone] = math.inf if what == "loss" else 1e300
    want = made("plu")
    losses, optimizer, wrong = ordinary(want, rows, math.inf)
    assert wrong == what and len(losses) == bad
    flow = made("plu")
    steps = GraphedSteps(flow, adamw(flow, 1.0, 0.1), rows, math.inf)
    found, wrong = all_steps(steps, ORDER, RATES)
    assert [*itertools.chain(*found)] == pytest.approx(losses, rel=1e-12) and wrong == what
    assert_same((want, optimizer), (flow, steps.arguments[1]), exact=False)


def test_a_capture_that_fails_is_said_once_and_its_steps_are_made() -> None:
    flow, rows = made("plu"), rows_of(FLOWS["plu"]())
    want = made("plu")
    losses, optimizer, _ = ordinary(want, rows, 0.5)
    captured = CapturedStep(DeviceStep(flow, adamw(flow, 1.0, 0.1), rows, 0.5, STEPS, BATCH))
    captured.step.order.copy_(ORDER)
    captured.step.rates.copy_(torch.tensor(RATES, dtype=torch.float64))
    captured.run()
    assert not captured.failed
    with pytest.warns(RuntimeWarning, match="could not be captured as a CUDA graph"):
        captured.run()
    assert captured.failed
    for _ in range(STEPS - 2):
        captured.run()
    assert captured.step.losses.tolist() == pytest.approx(losses, rel=1e-12)
    assert_same((want, optimizer), (flow, captured.step.optimizer), exact=False)


@pytest.mark.parametrize("name", ["plu", "context"])
def test_a_graphed_step_on_a_processor_is_an_ordinary_one(name: str) -> None:
    """Bit for bit, with a scheduler, in batches of two sizes, and from a checkpoint."""
    rows = rows_of(FLOWS[name]())
    flows = [made(name), made(name)]
    optimizers = [torch.optim.AdamW(flow.parameters(), 0.01, weight_decay=0.1, fused=True) for flow in flows]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10) for optimizer in optimizers]
    step = GraphedStep(flows[0], optimizers[0], rows.x, rows.context, rows.weights, clip=0.5)
    assert step.why_not == "the flow is on cpu, not on a GPU"

    def loop(index: Tensor) -> Tensor:
        x, context, weights = rows.pick(index, rows.x)
        loss = -(weights * flows[1].log_prob(x, context)).mean()
        optimizers[1].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flows[1].parameters(), 0.5)
        optimizers[1].step()
        return loss.detach()

    for k, index in enumerate([*ORDER, *ORDER[:, :5]]):
        with torch.inference_mode(False), torch.no_grad():
            found = step(index)
        assert torch.equal(found, loop(index))
        for scheduler in schedulers:
            scheduler.step()
        if k == 3:
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same((flows[1], optimizers[1]), (flows[0], optimizers[0]), exact=True)


def test_a_graphed_step_that_is_not_finite_changes_nothing() -> None:
    flow, rows = made("plu"), rows_of(FLOWS["plu"]())
    step = GraphedStep(flow, adamw(flow, 0.1, 0.1), rows.x)
    step(torch.tensor([4, 5, 6]))  # which starts ActNorms
    before = copy.deepcopy(flow.state_dict())
    rows.x[3] = 1e300
    assert not step(torch.tensor([3, 4, 5])).isfinite()
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert step(torch.tensor([4, 5, 6])).isfinite()


X = torch.randn(40, 5)


def trained(flow: Flow, kind: Any = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    return kind(flow.parameters(), 1e-3, **options)


class Chosen(CouplingFlow):
    """A class of a user's, whose density may be another."""


def with_hooks(flow: Flow) -> torch.optim.Optimizer:
    optimizer = trained(flow, fused=True)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def with_hooked_parameters(flow: Flow) -> torch.optim.Optimizer:
    next(flow.parameters()).register_post_accumulate_grad_hook(lambda _: None)
    return trained(flow, fused=True)


@pytest.mark.parametrize(
    ("flow", "optimizer", "why"),
    [
        (CouplingFlow(5, 1, (8,)), lambda f: trained(f, fused=True), "the flow is on cpu, not on a GPU"),
        (AutoregressiveFlow(5, 1, (8,)), lambda f: trained(f, fused=True), "the flow is on cpu, not on a GPU"),
        (CouplingFlow(5, 1, (8,), dropout=0.1), lambda f: trained(f, fused=True), "dropout"),
        (Chosen(5, 1, (8,)), lambda f: trained(f, fused=True), "not a CouplingFlow or an AutoregressiveFlow"),
        (CouplingFlow(5, 1, (8,)).to_layers(), lambda f: trained(f, fused=True), "not a CouplingFlow or an"),
        (CouplingFlow(5, 1, (8,)), trained, "an optimizer without fused=True"),
        (CouplingFlow(5, 1, (8,)), lambda f: trained(f, torch.optim.SGD), "SGD: the optimizer must be Adam or AdamW"),
        (
            CouplingFlow(5, 1, (8,)),
            lambda f: torch.optim.AdamW([{"params": [p]} for p in f.parameters()], fused=True),
            "an optimizer with several groups of parameters",
        ),
        (CouplingFlow(5, 1, (8,)), with_hooks, "an optimizer with hooks"),
        (CouplingFlow(5, 1, (8,)), with_hooked_parameters, "parameters with hooks"),
    ],
)
def test_what_cannot_be_captured_is_named_and_still_trains(flow: Flow, optimizer: Any, why: str) -> None:
    made_for = optimizer(flow)
    assert why_not(flow, made_for, Rows(X, None, None)).startswith(why)
    step = GraphedStep(flow, made_for, X)
    assert step.why_not.startswith(why)
    before = copy.deepcopy(flow.state_dict())
    assert step(torch.arange(8)).isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), flow.state_dict().values(), strict=True))


FLOW = CouplingFlow(5, 1, (8,))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((nn.Linear(5, 5), trained(FLOW), X), {}, "flow must be a glf_fast.Flow; got Linear"),
        ((FLOW, FLOW.parameters(), X), {}, "optimizer must be one of torch.optim; got generator"),
        ((FLOW, trained(FLOW), X), {"clip": 0.0}, "clip must be > 0 and finite; got 0.0"),
        ((FLOW, trained(FLOW), X[:, 1:]), {}, r"x must have shape \(rows, 5\); got \(40, 4\)"),
        ((FLOW, trained(FLOW), X, X), {}, "takes no context"),
        ((FLOW, trained(FLOW), X, None, -torch.ones(40)), {}, "weights must be finite and ≥ 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GraphedStep(*arguments, **options)


@pytest.mark.parametrize("rows", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64), X[:0].long()[:, 0], [1, 2]])
def test_rows_that_are_no_indices_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"rows must be indices \(B,\) into x, an int64 tensor; got"):
        GraphedStep(FLOW, trained(FLOW), X)(rows)


@pytest.mark.filterwarnings("ignore:glf_fast. steps go through Python:RuntimeWarning")  # there is no graph here
def test_steps_between_two_looks_grow_with_the_time_that_they_take() -> None:
    """All rows of an epoch come once, whatever the number of steps a call."""
    flow, rows = made("plu"), rows_of(FLOWS["plu"](), weighted=False)
    steps = GraphedSteps(flow, adamw(flow, 1.0, 0.1), rows, math.inf)
    order = torch.arange(BATCH).repeat(60, 1)
    found, wrong = all_steps(steps, order, [1e-3] * 60)
    calls = [*map(len, found)]
    assert not wrong and sum(calls) == 60 and all(b <= 4 * a for a, b in itertools.pairwise(calls)) and len(calls) < 60
