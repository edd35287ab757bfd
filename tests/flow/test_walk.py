"""The walk of x through `CouplingFlow.log_prob` in training: which functions of ours are entered, and in which files."""

import sys
from pathlib import Path
from types import FrameType
from unittest import mock

import pytest
import torch

import glf_fast
from glf_fast import CouplingFlow, backends, use_backend
from glf_fast.ops.linear import plu

PACKAGE = Path(glf_fast.__file__).parent
# Python before 3.12 enters them as functions; they are part of the function that they stand in.
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}


def walk(backend: str, linear: str = "plu") -> list[tuple[str, str]]:
    """(file, function) of every Python function of the package that one forward of log_prob enters, in order."""
    if backend == "cpp" and not backends()["cpp"].startswith("ready"):
        pytest.skip(backends()["cpp"])
    torch.manual_seed(0)
    flow, x = CouplingFlow(4, 2, (8,), linear=linear), torch.randn(3, 4)
    entered: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if event == "call" and PACKAGE in path.parents and name not in COMPREHENSIONS:
            entered.append((path.relative_to(PACKAGE).as_posix(), name))

    with use_backend(backend):
        flow.log_prob(x)  # ActNorms have started
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            flow.log_prob(x)
        finally:
            sys.setprofile(before)
    return entered


# What coupling flows share with autoregressive ones is in a file of its own, flow/stacked_flow.py. Permutations pass through
# the cache of maps, flow/assembled.py, and are assembled in flow/linear.py; dense layers are inverted by an operation, which
# has two files more.
@pytest.mark.parametrize(("linear", "way"), [("plu", 7), ("permutation", 8), ("dense", 10)])
@pytest.mark.parametrize(("backend", "functions"), [("cpp", 36), ("reference", 44)])
def test_the_walk_is_short(backend: str, functions: int, linear: str, way: int) -> None:
    """The reference's own files are the formulas of the flow, and not counted as files of the way to them."""
    entered = walk(backend, linear)
    files = {file for file, _ in entered if not file.startswith("reference/")}
    shortest = (backend, linear) == ("cpp", "plu")
    assert len(entered) <= (20 if shortest else functions), entered
    assert len(files) <= (6 if shortest else way), files


@pytest.mark.parametrize("linear", ["plu", "dense", "permutation"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_functions_of_checks_are_called_for_errors_alone(backend: str, linear: str) -> None:
    assert not [name for file, name in walk(backend, linear) if file == "ops/checks.py"]


@pytest.mark.parametrize("linear", ["plu", "permutation"])
@pytest.mark.parametrize("backend", ["cpp", "reference", "triton"])
def test_every_argument_is_checked_once(backend: str, linear: str) -> None:
    if not backends()[backend].startswith("ready"):
        pytest.skip(backends()[backend])
    op = sys.modules["glf_fast.ops.coupling_flow"]
    flow, x = CouplingFlow(4, 2, (8,), linear=linear), torch.randn(3, 4)
    flow.log_prob(x)
    with (
        use_backend(backend),
        mock.patch.object(op, "_checked", wraps=op._checked) as call,
        mock.patch.object(plu, "check", wraps=plu.check) as factors,
    ):
        flow.log_prob(x)
    once = backend != "cpp"  # whose operations refuse what the checks refuse
    assert call.call_count == once and factors.call_count == (once and linear == "plu")
