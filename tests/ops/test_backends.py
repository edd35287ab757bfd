"""The choice of kernels: what they refuse, and who takes it then."""

import sys
from types import SimpleNamespace

import pytest
import torch
from flow_values import error, run, tensors
from torch import Tensor

from glf_fast import backends, ops, reference, use_backend
from glf_fast.ops.backends import BACKENDS, Backend, kernels_for, ordinary, transformed
from glf_fast.ops.codes import ACTIVATION_CODES, COUPLING_CODES, LOG_SCALE_CODES, NETWORK_CODES
from glf_fast.ops.coupling_flow import cpp, cuda, layered, plain, triton
from glf_fast.ops.coupling_flow.call import Call, CallOptions, Maps
from glf_fast.reference import ACTIVATIONS, COUPLINGS, LOG_SCALES, MASKED_NETWORKS, NETWORKS

has_cpp = pytest.mark.skipif(not backends()["cpp"].startswith("ready"), reason=backends()["cpp"])


def call(D: int, hidden: tuple[int, ...], **changes) -> Call:
    x, A, c, context, *layers = (None if t is None else t.detach() for t in tensors(3, 1, D, 0, hidden))
    half = len(layers) // 2
    options = CallOptions("affine", "mlp", "relu", 0.0, "tanh", None, False, None, *[False] * 4, 2.0)._replace(
        **changes
    )
    return Call(x, context, Maps(A, c, None), layers[:half], layers[half:], options)


@has_cpp
def test_every_name_of_the_reference_is_known_to_the_library_by_a_number() -> None:
    for codes, names in (
        (ACTIVATION_CODES, ACTIVATIONS),
        (COUPLING_CODES, COUPLINGS),
        (LOG_SCALE_CODES, LOG_SCALES),
        (NETWORK_CODES, {*NETWORKS, *MASKED_NETWORKS}),
    ):
        assert codes.keys() == set(names) and sorted(codes.values()) == list(range(len(names)))
    for table, name in (("log_scale", "relu"), ("coupling", ""), ("", "tanh")):
        assert torch.ops.glf_fast.cpu_code(table, name) == -1


@pytest.mark.parametrize("op", ["coupling_flow", "affine_coupling", "spline"])
def test_kernels_follow_the_protocol(op: str) -> None:
    for kernels in sys.modules[f"glf_fast.ops.{op}"].KERNELS:
        assert set(kernels.BACKENDS) <= set(BACKENDS.values()) and callable(kernels.refuses), kernels


def test_kernels_say_why_they_refuse() -> None:
    assert cpp.refuses(call(4, (3,) * 16)) == "" and "more than 17 layers" in cpp.refuses(call(4, (3,) * 17))
    assert "no such" in cpp.refuses(call(4, (3,), log_scale="none"))
    assert triton.refuses(call(256, (512,))) == ""
    for kernels in (cpp, triton, layered):
        assert "coupling" in kernels.refuses(call(4, (3,), coupling="none"))
        assert "network" in kernels.refuses(call(4, (3,), network="none"))
    for constant, why in ((1.0, "float64"), (0.5, "a constant other than its default")):
        assert why in cuda.refuses(call(4, (3,), activation="elu", activation_constant=constant))
    for D, hidden in ((257, (8,)), (6, (513,)), (6, ()), (6, (8,) * 5)):
        assert "more than 256 columns" in triton.refuses(call(D, hidden)) and layered.refuses(call(D, hidden)) == ""


@has_cpp
def test_blocks_of_several_threads_leave_the_choice_as_it_was() -> None:
    state = sys.modules["glf_fast.ops.backends"]
    before = state._choice
    first, second, third = use_backend("reference"), use_backend("cpp"), use_backend("reference")
    for block, choice in ((first, "reference"), (second, "cpp"), (third, "reference")):
        block.__enter__()
        assert state._choice == choice
    for block, choice in ((first, "reference"), (third, "cpp"), (second, before)):
        block.__exit__(None, None, None)
        assert state._choice == choice


@has_cpp
def test_the_first_that_takes_a_call_is_chosen() -> None:
    small, deep = call(4, (3,)), call(4, (3,) * 17)
    assert kernels_for(small.x, small, triton, layered, cpp) is cpp
    assert kernels_for(deep.x, deep, triton, layered, cpp) is None
    with use_backend("reference"):
        assert kernels_for(small.x, small, cpp) is None
    with torch.autograd.forward_ad.dual_level():
        assert transformed() and kernels_for(small.x, small, cpp) is None
    assert ordinary() and not transformed()


def test_what_all_kernels_refuse_is_the_reference_s() -> None:
    values = tensors(3, 2, 4, 0, (3,) * 17)
    with torch.no_grad():
        x, A, c, _, *layers = values
        without = ops.coupling_flow(x, A, c, layers[:18], layers[18:])
    for mine, truth in zip(run(ops.coupling_flow, values), run(reference.coupling_flow, values), strict=True):
        assert error(mine, truth) < 1e-12
    assert error(without[0], run(reference.coupling_flow, values)[0]) < 1e-12


def test_a_new_backend_is_one_module_and_one_entry(monkeypatch) -> None:
    """A module that says what it is for, what it refuses and how it runs takes calls when the op lists it."""
    monkeypatch.setattr(sys.modules["glf_fast.ops.backends"], "BACKENDS", registry := dict(BACKENDS))
    op = sys.modules["glf_fast.ops.coupling_flow"]
    backend = Backend("toy", "cpu", (torch.float64,), missing="", ready=lambda: "for tests", remedy="", cost="")
    seen: list[Call] = []

    def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(call)
        return *plain.run(call), call.x.new_empty(0)

    toy = SimpleNamespace(
        BACKENDS=(backend,),
        refuses=lambda call: "contexts" if call.context is not None else "",
        adapt=lambda call: call,
        forward=forward,
    )
    monkeypatch.setattr(op, "KERNELS", (toy, *op.KERNELS))
    assert registry["toy"] is backend and backends()["toy"] == "ready: for tests"
    for context_dim, times in ((0, 1), (2, 0)):
        x, A, c, context, *layers = (None if t is None else t.detach() for t in tensors(3, 2, 4, context_dim, (5,)))
        with use_backend("toy"):
            out = ops.coupling_flow(x, A, c, layers[:2], layers[2:], context)
        assert len(seen) == times and torch.equal(
            out[0], reference.coupling_flow(x, A, c, layers[:2], layers[2:], context)[0]
        )
        seen.clear()
