"""On a GPU: training steps that are replays of a graph, against an ordinary loop."""

import copy
import warnings

import pytest
import torch
from torch import Tensor

from glf_fast import AutoregressiveFlow, CouplingFlow, Flow, GraphedStep, backends, fit, use_backend
from glf_fast.fitting.graphed import GraphedSteps
from glf_fast.fitting.run import Run
from glf_fast.fitting.steps import Steps

pytestmark = pytest.mark.gpu
FLOWS = {
    "small": lambda: CouplingFlow(6, 3, (16, 16), context_dim=2),
    "medium": lambda: CouplingFlow(64, 3, (128, 128), context_dim=2),
    "reversible": lambda: CouplingFlow(6, 3, (16, 16), context_dim=2, reversible=True),
    "dense": lambda: CouplingFlow(6, 3, (16, 16), context_dim=2, linear="dense"),
    "masked": lambda: AutoregressiveFlow(6, 3, (16, 16), context_dim=2),
}


@pytest.fixture(autouse=True)
def on_a_gpu(device) -> None:
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU; tests/fitting/test_graphed.py has the same steps on a processor")


def made(name: str, device: torch.device) -> tuple[Flow, Tensor, Tensor, Tensor]:
    """A flow a little off its start, rows, contexts and weights."""
    torch.manual_seed(0)
    flow = FLOWS[name]().to(device)
    with torch.no_grad():
        for key, parameter in flow.named_parameters():
            if "actnorm" not in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
    x, context = torch.randn(300, *flow.event_shape).exp(), torch.randn(300, 2)
    return flow.train(), x.to(device), context.to(device), torch.rand(300).to(device)


def assert_close(a: Flow, b: Flow) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", FLOWS)
def test_replays_are_the_steps_of_a_loop(name: str, clip: float | None, device) -> None:
    """A scheduler, batches of two sizes, and a state that is loaded in between."""
    flow, x, context, weights = made(name, device)
    flows = [flow, copy.deepcopy(flow)]
    optimizers = [torch.optim.AdamW(flow.parameters(), 1e-3, weight_decay=0.1, fused=True) for flow in flows]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20) for optimizer in optimizers]
    step = GraphedStep(flows[0], optimizers[0], x, context, weights, clip=clip)
    order = torch.randint(300, (12, 100), device=device)
    for k, rows in enumerate([*order, *order[:5, :64]]):
        found = step(rows)
        loss = -(weights[rows] * flows[1].log_prob(x[rows], context[rows])).mean()
        optimizers[1].zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(flows[1].parameters(), clip)
        optimizers[1].step()
        torch.testing.assert_close(found, loss.detach(), rtol=1e-3, atol=1e-3)
        for scheduler in schedulers:
            scheduler.step()
        if k == 5:
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not step.why_not
    fused = name == "small" and torch.cuda.get_device_capability() >= (8, 0) and backends()["cuda"].startswith("ready")
    assert all((captured._small is not None) == fused for captured in step._by_batch.values())
    assert_close(*flows)
    for a, b in zip(*(optimizer.state_dict()["state"].values() for optimizer in optimizers), strict=True):
        assert a["step"] == b["step"] == 17


def test_a_step_that_is_not_finite_changes_nothing(device) -> None:
    flow, x, context, _ = made("small", device)
    optimizer = torch.optim.AdamW(flow.parameters(), 1e-3, fused=True)
    step = GraphedStep(flow, optimizer, x, context)
    rows = torch.arange(100, device=device)
    for _ in range(3):
        step(rows)
    before = copy.deepcopy((flow.state_dict(), optimizer.state_dict()["state"]))
    x[3] = torch.inf
    assert not step(rows).isfinite()
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, before[1][key][name]), name
    x[3] = 1
    assert step(rows).isfinite() and optimizer.state_dict()["state"][0]["step"] == 4


@pytest.mark.parametrize("name", ["small", "medium", "masked"])
def test_fit_replays_and_is_what_it_is_without_graphs(name: str, device, monkeypatch) -> None:
    results, flows = [], []
    for kind in (GraphedSteps, Steps):
        flow, x, context, weights = made(name, device)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            if kind is Steps:
                patch.setattr(Run, "_kind_of_steps", lambda self: Steps)
            result = fit(
                flow, x, context, epochs=20, batch_size=64, lr=1e-3, weights=weights, clip=5.0, schedule="cosine",
                validation=0, progress=False,
            )  # fmt: skip
        results.append(result)
        flows.append(flow)
    assert results[0].steps == results[1].steps == 80
    assert results[0].training_loss == pytest.approx(results[1].training_loss, rel=1e-3, abs=1e-3)
    assert_close(*flows)


def test_parameters_that_are_changed_in_between_are_seen(device) -> None:
    """Also those that are changed behind autograd's back: each step packs them again."""
    flow, x, context, _ = made("small", device)
    optimizer = torch.optim.AdamW(flow.parameters(), 1e-3, fused=True)
    step, rows = GraphedStep(flow, optimizer, x, context), torch.arange(100, device=device)
    for _ in range(5):
        step(rows)
    for p in flow.parameters():
        p.data.mul_(0.9)
    want = -flow.log_prob(x[rows], context[rows]).mean().detach()
    torch.testing.assert_close(step(rows), want, rtol=1e-4, atol=1e-4)


def test_fit_says_why_it_does_not_capture(device, capfd) -> None:
    flow, x, context, _ = made("small", device)
    fit(flow, x.cpu(), context.cpu(), epochs=1, batch_size=64)
    assert "cannot be captured as a CUDA graph: the flow and the rows are on several devices" in capfd.readouterr().err


def test_fit_goes_on_from_a_file(device, tmp_path) -> None:
    runs = []
    for stops in ((4,), (2, 4)):
        flow, x, context, _ = made("small", device)
        start = copy.deepcopy(flow.state_dict())
        for epochs in stops:
            flow.load_state_dict(start)
            fit(flow, x, context, epochs=epochs, batch_size=64, resume=tmp_path / f"{stops}", progress=False)
        runs.append(flow)
    assert_close(*runs)


def test_without_our_kernels_steps_are_captured_or_said_not_to_be(device) -> None:
    flow, x, context, _ = made("small", device)
    with use_backend("reference"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step = GraphedStep(flow, torch.optim.AdamW(flow.parameters(), 1e-3, fused=True), x, context)
        losses = [step(torch.arange(100, device=device)).item() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert bool(step.why_not) == any("could not be captured" in str(w.message) for w in said)
