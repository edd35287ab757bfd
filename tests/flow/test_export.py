"""Flows in other programs: ONNX from plain operations, and a count of floating-point operations."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import glf_fast.ops.flops  # noqa: F401 — which tells the counter what the kernels do
from glf_fast import CouplingFlow, use_backend


class Of(nn.Module):
    """A method of a flow."""

    def __init__(self, method: str, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flow = CouplingFlow(5, 3, (8,), **options).eval()
        self.method = method
        with torch.no_grad():
            for p in self.flow.parameters():
                p.add_(0.2 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        out = getattr(self.flow, self.method)(x)
        return out[0] if isinstance(out, tuple) else out


def operations(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("linear", ["plu", "permutation"])
@pytest.mark.parametrize("method", ["log_prob", "forward", "inverse"])
def test_onnx_gets_plain_operations(method: str, linear: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = Of(method, linear=linear).eval(), torch.randn(4, 5)
    wanted = model(x)
    assert "glf_fast" in operations(torch.export.export(model, (x,)))
    with monkeypatch.context() as patch:  # as torch.onnx.export does before it exports the program
        patch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
        program = torch.export.export(model, (x,))
    assert "glf_fast" not in operations(program)
    assert not any("solve" in str(node.target) for node in program.graph.nodes)  # ONNX has none
    torch.testing.assert_close(program.module()(x), wanted, rtol=1e-5, atol=1e-5)
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        import onnxruntime

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's own exporter
            torch.onnx.export(model, (x,), tmp_path / "flow.onnx", dynamo=True)
        session = onnxruntime.InferenceSession(tmp_path / "flow.onnx")
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.as_tensor(got), wanted, rtol=1e-4, atol=1e-4)


def test_floating_point_operations_are_counted() -> None:
    """About as many as of the reference: it counts what PyTorch runs for the same matrix products."""
    model, x = Of("log_prob", linear="plu"), torch.randn(32, 5)
    counts = []
    for backend in ("auto", "reference"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] > 0 and counts[0] == pytest.approx(counts[1], rel=0.2)
