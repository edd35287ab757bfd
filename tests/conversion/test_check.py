"""The check that guards every conversion: it finds what is wrong, each kind of wrong by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import forked
import pytest
import torch
import zuko
from torch import nn

from glf_fast import CouplingFlow, SequentialFlow
from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.check import check
from glf_fast.conversion.fuse import fuse
from glf_fast.conversion.reading import read_flow
from glf_fast.conversion.zuko import LIBRARY


def made() -> tuple:
    torch.manual_seed(0)
    flow = zuko.flows.RealNVP(5, 2, transforms=3, hidden_features=(6, 7)).double()
    reading = read_flow(LIBRARY, flow)
    return flow, reading, *fuse(reading.layers, (5,), (2,))


def stacked(flow: nn.Module) -> CouplingFlow:
    return next(m for m in flow.modules() if isinstance(m, CouplingFlow))


def change(name: str) -> Callable[[nn.Module], None]:
    def apply(flow: nn.Module) -> None:
        with torch.no_grad():
            stacked(flow).get_parameter(name)[-1] += 1e-4

    return apply


def hold_one_entry_too_many(flow: nn.Module) -> None:
    part = stacked(flow)
    trained = torch.ones_like(part.mlp_weights[1], dtype=torch.bool)
    trained[0, 2, 3] = False
    part.hold("mlp_weights.1", trained)


def freeze(flow: nn.Module) -> None:
    stacked(flow).mlp_biases[0].requires_grad_(False)


def another_constant(flow: nn.Module) -> None:
    stacked(flow)._options["log_scale_constant"] = 1.1e-3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("mlp_weights.2"), "log_prob differs"),
        (change("mlp_biases.0"), "log_prob differs"),
        (another_constant, "log_prob differs"),
        (hold_one_entry_too_many, r"gradient of log_prob with respect to transform.transforms.0.hyper.2.weight"),
        (freeze, r"gradient of log_prob with respect to transform.transforms.0.hyper.0.bias"),
    ],
)
def test_a_wrong_conversion_is_not_returned(spoil, message: str) -> None:
    flow, reading, fused, sources = made()
    check(flow, reading, fused, sources)
    spoil(fused)
    with pytest.raises(ConversionError, match=message):
        check(flow, reading, fused, sources)


def test_a_wrong_inverse_is_not_returned() -> None:
    flow, reading, fused, sources = made()
    wrong = replace(reading, inverse=lambda z, context: reading.inverse(z, context) + 1e-4)
    with pytest.raises(ConversionError, match=r"the inverse differs by 0\.0001"):
        check(flow, wrong, fused, sources)


def test_a_layer_read_as_another_is_not_returned(monkeypatch) -> None:
    monkeypatch.setattr("glf_fast.conversion.log_scales.log_scale", lambda u, *_: u / (1 + torch.abs(u / 6.9)))
    flow = zuko.flows.RealNVP(4)
    with pytest.raises(ConversionError):
        convert(flow)


@pytest.mark.parametrize(
    ("validate", "message"),
    [
        (False, "not finite on random inputs"),
        (True, "fails on random inputs: ValueError Expected value argument [^\n]*$"),
    ],
)
def test_flows_that_overflow_everywhere_cannot_be_compared(
    monkeypatch: pytest.MonkeyPatch, validate: bool, message: str
) -> None:
    """Both with the distributions' own checks, as other libraries switch them on when they are imported, and without."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", validate)
    flow = zuko.flows.RealNVP(4)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.fill_(torch.inf)
    with pytest.raises(ConversionError, match=message):
        convert(flow)


def test_converting_keeps_generator_dtype_mode_and_flags() -> None:
    flow = zuko.flows.RealNVP(4).double().eval()
    state = torch.get_rng_state()
    converted = convert(flow)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in converted.parameters()} == {torch.float64} and not converted.training
    assert isinstance(convert(zuko.flows.RealNVP(4).train()), SequentialFlow)
    with torch.no_grad():
        assert any(p.requires_grad for p in convert(zuko.flows.RealNVP(4)).parameters())


def test_importing_glf_fast_imports_no_library() -> None:
    code = (
        "import sys, glf_fast; assert 'glf_fast.conversion' not in sys.modules\n"
        "print(glf_fast.convert, glf_fast.accelerate(__import__('torch').nn.Linear(1, 1)))\n"
        "assert not {'zuko', 'nflows', 'normflows', 'FrEIA'} & set(sys.modules)"
    )
    done = forked.fresh(code)
    assert done.returncode == 0, done.stderr
