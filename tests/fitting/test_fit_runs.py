"""Runs of fit that are interrupted, and go on."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import Tensor, nn

from glf_fast import CouplingFlow, FitResult, Flow, fit
from glf_fast.errors import UserError
from glf_fast.fitting import fused
from glf_fast.fitting.fused import FusedSteps
from glf_fast.fitting.steps import Steps
from glf_fast.flow import Embedded


def plain() -> Flow:
    return CouplingFlow(4, 3, (16,), context_dim=3)


def dropout() -> Flow:
    return Embedded(CouplingFlow(4, 2, (8,), context_dim=4), nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3)), (3,))


def frozen_offsets() -> Flow:
    flow = plain()
    flow.actnorm_bias.requires_grad_(False)
    return flow


FLOWS = {"fused": plain, "dropout": dropout}
OPTIONS: dict[str, Any] = {
    "epochs": 6,
    "batch_size": 20,
    "lr": 0.01,
    "schedule": "cosine",
    "clip": 5.0,
    "progress": False,
}


def run(make: Callable[[], Flow], **options: Any) -> tuple[Flow, FitResult]:
    torch.manual_seed(0)
    flow = make()
    x, context = torch.randn(200, 4).exp(), torch.randn(200, 3)
    return flow, fit(flow, x, context, **OPTIONS | options)


def numbers(flow: Flow) -> Tensor:
    return torch.cat([t.flatten().double() for t in flow.state_dict().values()])


def same(a: tuple[Flow, FitResult], b: tuple[Flow, FitResult]) -> None:
    assert torch.equal(numbers(a[0]), numbers(b[0]))
    for name in ("training_loss", "validation_loss", "best_epoch", "steps", "stopped"):
        assert getattr(a[1], name) == getattr(b[1], name), name


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """One step a call, and a real SIGINT during the call of that number."""
    calls, when = [0], [-1]
    monkeypatch.setattr(fused, "SECONDS", 0.0)
    for kind in (FusedSteps, Steps):

        def counted(self: Any, *arguments: Any, original: Any = kind.run) -> Any:
            calls[0] += 1
            if calls[0] == when[0]:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, *arguments)

        monkeypatch.setattr(kind, "run", counted)

    def set_to(call: int) -> None:
        when[0] = calls[0] + call

    return set_to


@pytest.mark.parametrize("name", FLOWS)
def test_an_interrupted_run_keeps_its_best_weights_and_goes_on_bit_for_bit(
    name: str, interrupt_at: Callable[[int], None], tmp_path: Path
) -> None:
    whole = run(FLOWS[name])
    assert whole[1].steps == 6 * 9
    file = tmp_path / "run" / "fit.pt"
    interrupt_at(9 * 2 + 4)
    flow, result = run(FLOWS[name], resume=file)
    assert (result.stopped, result.steps, len(result.training_loss)) == ("interrupted", 22, 2)
    best = run(FLOWS[name], callback=lambda r: len(r.training_loss) == result.best_epoch)[0]
    assert torch.equal(numbers(flow), numbers(best))
    interrupt_at(1)  # at once again, in a later part of the same epoch
    assert run(FLOWS[name], resume=file)[1].steps == 23
    # Stopped by its callback after an epoch.
    assert run(FLOWS[name], resume=file, callback=lambda r: len(r.training_loss) == 4)[1].stopped == "callback"
    same(run(FLOWS[name], resume=file), whole)
    same(run(FLOWS[name], resume=file), whole)  # there is nothing left to do
    assert os.listdir(file.parent) == ["fit.pt"]


def test_more_epochs_go_on_where_fewer_ended(tmp_path: Path) -> None:
    options = {"schedule": None, "resume": tmp_path / "fit.pt"}
    run(plain, **options, epochs=2)
    same(run(plain, **options, epochs=4), run(plain, schedule=None, epochs=4))


def test_a_file_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fit.pt"
    run(plain, epochs=1, schedule=None, resume=file)
    written = file.read_bytes()
    other = {"epochs": 1, "schedule": None, "resume": file}
    for make, options, message in [
        (plain, {"batch_size": 10}, r"has batch_size=20, not 10; delete it"),
        (plain, {"validation": (torch.ones(5, 4), torch.ones(5, 3))}, "has other data"),
        (dropout, {}, "has another flow"),
        (lambda: CouplingFlow(**{**plain().config, "activation": "tanh"}), {}, "has another flow"),
        (frozen_offsets, {}, "has another flow"),
    ]:
        with pytest.raises(UserError, match=message):
            run(make, **other | options)
    flipped = bytearray(written)
    flipped[len(written) // 2] ^= 1
    for damaged in (b"", written[:1000], bytes(flipped), b"{}"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged or not a file of glf_fast\.fit"):
            run(plain, **other)


CHILD = """
import os, sys, torch
from pathlib import Path
from glf_fast import CouplingFlow, fit
torch.manual_seed(0)
flow = CouplingFlow(4, 3, (16,), context_dim=3)
x, context = torch.randn(200, 4).exp(), torch.randn(200, 3)
result = fit(flow, x, context, epochs=10**6, batch_size=20, lr=1e-5, resume="fit.pt", callback=lambda r: Path("begun").touch())
print(result.stopped, len(result.training_loss) == result.steps // 9, Path("fit.pt").exists())
"""


def test_ctrl_c_ends_training_not_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(forked.Child(forked.program, CHILD)) as child:
        deadline = time.monotonic() + 60
        while not Path("begun").exists() and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
    assert out.split() == ["interrupted", "True", "True"], out + err
    assert "interrupted in epoch" in err and "Traceback" not in err


@pytest.mark.parametrize("name", FLOWS)
def test_modes_outside_and_callbacks_that_sample_change_nothing(name: str) -> None:
    def sample(result: FitResult) -> None:
        made.eval().sample(3, torch.zeros(3))

    torch.manual_seed(0)
    made = FLOWS[name]()
    x, context = torch.randn(200, 4).exp(), torch.randn(200, 3)
    with torch.no_grad():
        result = fit(made, x, context, **OPTIONS, callback=sample)
    if name == "fused":  # sampling draws from the generator that dropout has
        same((made, result), run(FLOWS[name]))
    assert result.stopped == "epochs" and not any(p.grad is not None for p in made.parameters())


def test_a_run_in_another_thread_needs_no_signals() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, plain, epochs=1).result()[1].stopped == "epochs"
