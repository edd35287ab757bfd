"""Tensors without data, with freed data, on two devices; sizes that change under torch.compile: errors, never rubbish."""

import copy
from collections.abc import Callable

import pytest
import torch
from flow_values import tensors
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from glf_fast import CouplingFlow, ops
from glf_fast.flow.base import any_parameter


def arguments() -> list[Tensor]:
    x, A, c, context, *layers = (t.detach() for t in tensors(3, 2, 5, 2, (7,), torch.float32))
    return [x, A, c, context, *layers]


def flow(x: Tensor, A: Tensor, c: Tensor, context: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
    half = len(layers) // 2
    return ops.coupling_flow(x, A, c, layers[:half], layers[half:], context)


def density(x: Tensor, A: Tensor, c: Tensor, context: Tensor, *layers: Tensor) -> Tensor:
    half = len(layers) // 2
    return ops.coupling_flow_log_prob(x, A, c, torch.zeros(()), layers[:half], layers[half:], context)


def coupling(v: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return ops.affine_coupling(v, u, t)


OPERATIONS: dict[str, tuple[Callable[..., object], Callable[[], list[Tensor]]]] = {
    "flow": (flow, arguments),
    "density": (density, arguments),
    "coupling": (coupling, lambda: [torch.randn(3, 4) for _ in range(3)]),
    "slogdet": (ops.slogdet_inverse, lambda: [torch.randn(3, 4, 4)]),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("graded", [False, True])
def test_freed_storage_is_an_error(name: str, graded: bool) -> None:
    run, make = OPERATIONS[name]
    for i in range(len(make())):
        given = make()
        given[i].untyped_storage().resize_(0)
        if graded:
            given = [t.requires_grad_() for t in given]
        with pytest.raises(RuntimeError), torch.set_grad_enabled(graded):
            run(*given)


@pytest.mark.parametrize("name", ["flow", "density", "coupling"])
@pytest.mark.parametrize("graded", [False, True])
def test_one_argument_without_data_is_an_error(name: str, graded: bool) -> None:
    run, make = OPERATIONS[name]
    for i in range(len(make())):
        given = make()
        given[i] = given[i].to("meta")
        if graded:
            given = [t.requires_grad_() for t in given]
        with pytest.raises((RuntimeError, ValueError)), torch.set_grad_enabled(graded):
            run(*given)


def test_a_partly_loaded_flow_is_an_error() -> None:
    whole = CouplingFlow(4, 2, (8,)).eval()
    for name, _ in whole.named_parameters():
        partly = copy.deepcopy(whole)
        place, _, last = name.rpartition(".")
        owner = partly.get_submodule(place)
        owner._parameters[last] = torch.nn.Parameter(owner.get_parameter(last).to("meta"))
        for run in (lambda f: f.log_prob(torch.randn(3, 4)), lambda f: f.sample(3)):
            with pytest.raises((RuntimeError, ValueError, NotImplementedError)), torch.no_grad():
                assert run(partly).device.type != "meta", "a result on meta says what it is"
                raise AssertionError(name)


def test_flows_are_built_on_meta_and_loaded() -> None:
    whole = CouplingFlow(4, 2, (8,))
    whole.log_prob(torch.randn(30, 4))
    with torch.device("meta"):
        empty = CouplingFlow(4, 2, (8,))
    empty.load_state_dict(whole.state_dict(), assign=True)
    x = torch.randn(5, 4)
    assert torch.equal(empty.log_prob(x), whole.log_prob(x)), "and no second start from x"


@pytest.mark.parametrize("graded", [False, True])
def test_batches_are_dynamic_under_compile(graded: bool) -> None:
    torch.compiler.reset()
    count = CompileCounterWithBackend("aot_eager")
    one = CouplingFlow(4, 2, (8,), actnorm=False)
    compiled = torch.compile(one.log_prob, backend=count, dynamic=True, fullgraph=True)
    compilations = []
    with torch.set_grad_enabled(graded):
        for n in range(11, 18):
            x = torch.randn(n, 4)
            torch.testing.assert_close(compiled(x), one.log_prob(x))
            compilations.append(count.frame_count)
    assert compilations[0] == compilations[-1], "the first graph serves all sizes"


def test_the_number_of_samples_is_dynamic_under_compile() -> None:
    torch.compiler.reset()
    one = CouplingFlow(4, 2, (8,), actnorm=False)
    compiled = torch.compile(lambda n: one.sample(n) + 0, backend="aot_eager")
    assert [len(compiled(n)) for n in (2, 3, 4)] == [2, 3, 4]


def test_replicas_of_data_parallel_draw() -> None:
    """Replicas that nn.DataParallel makes on each GPU: modules whose parameters are plain tensors."""
    one = CouplingFlow(4, 2, (8,), actnorm=False).double()
    replica = one._replicate_for_data_parallel()
    for name, part in one.named_modules():
        twin = part._replicate_for_data_parallel() if name else replica
        twin._former_parameters = {key: p.detach().clone() for key, p in part._parameters.items() if p is not None}
        for key, tensor in twin._former_parameters.items():
            twin._parameters.pop(key, None)
            if not isinstance(twin, torch.nn.ParameterList):
                setattr(twin, key, tensor)
    assert next(replica.parameters(recurse=False), None) is None
    assert any_parameter(replica).dtype == torch.float64


def test_shapes_that_do_not_fit_are_named() -> None:
    x, D = torch.randn(5, 2), torch.eye(2)
    for run, message in (
        (lambda: ops.actnorm_log_prob(x[:, :, None], x[0], x[0]), r"x must have shape \(batch, D\)"),
        (lambda: ops.actnorm_log_prob(x, x[0, :1], x[0]), r"log_scale must have shape \(D,\) = \(2\)"),
        (lambda: ops.channel_map(x, D[0], x[0]), r"matrix must have shape \(D, D\)"),
        (lambda: ops.channel_map(x, D[:, :, None], x[0]), r"matrix must have shape \(D, D\)"),
        (lambda: ops.channel_map(x, torch.eye(3), torch.zeros(3)), r"x must have shape \(batch, D, …\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run()
