"""Tensors without data, with freed data, on two devices; sizes that change under torch.compile: errors, never rubbish."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flow_values import tensors
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from glf_fast import (
    MLP,
    ActNorm,
    AffineCoupling,
    AutoregressiveFlow,
    CouplingFlow,
    FixedLinear,
    Flow,
    FlowTransform,
    Inverse,
    InvertibleLinear,
    SequentialFlow,
    Split,
    Squeeze,
    ops,
)
from glf_fast.flow import Embedded
from glf_fast.flow.base import any_parameter
from glf_fast.reference import Plu


def arguments() -> list[Tensor]:
    x, A, c, context, *layers = (t.detach() for t in tensors(3, 2, 5, 2, (7,), torch.float32))
    return [x, A, c, context, *layers]


def flow(x: Tensor, A: Tensor, c: Tensor, context: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
    half = len(layers) // 2
    return ops.coupling_flow(x, A, c, layers[:half], layers[half:], context)


def density(x: Tensor, A: Tensor, c: Tensor, context: Tensor, *layers: Tensor) -> Tensor:
    half = len(layers) // 2
    return ops.coupling_flow_log_prob(x, A, c, torch.zeros(()), layers[:half], layers[half:], context)


def autoregressive(x: Tensor, A: Tensor, c: Tensor, context: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
    fan_in = torch.tensor([[0, 1, 2, 3, 3, 4, 4, 0, 2, 3, 4, 7]] * 2)  # of 7 hidden units and 5 features
    return ops.autoregressive_flow(x, A, c, layers[:2], layers[2:], fan_in, context)


def autoregressive_arguments() -> list[Tensor]:
    x, A, c, context, *_ = arguments()
    return [x, A, c, context, *(torch.randn(2, *shape) for shape in ((7, 7), (7, 10), (7,), (10,)))]


def coupling(v: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return ops.affine_coupling(v, u, t)


def glow_coupling(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    return ops.glow_coupling(x, *parameters, 3.0)  # type: ignore[arg-type]


def glow_arguments() -> list[Tensor]:
    sizes = [(3, 4, 5, 5), (8, 3, 3, 3), (8,), (8,), (8, 8, 1, 1), (8,), (8,), (4, 8, 3, 3), (4, 3, 3), (4,), (4,)]
    return [torch.randn(size) for size in sizes]


def channels_last() -> Tensor:
    return torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last)


OPERATIONS: dict[str, tuple[Callable[..., object], Callable[[], list[Tensor]]]] = {
    "flow": (flow, arguments),
    "density": (density, arguments),
    "autoregressive": (autoregressive, autoregressive_arguments),
    "coupling": (coupling, lambda: [torch.randn(3, 4) for _ in range(3)]),
    "slogdet": (ops.slogdet_inverse, lambda: [torch.randn(3, 4, 4)]),
    "glow coupling": (glow_coupling, glow_arguments),
    "channels": (ops.channel_map, lambda: [channels_last(), torch.randn(4, 4), torch.randn(4)]),
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


@pytest.mark.parametrize("name", ["flow", "density", "autoregressive", "coupling", "glow coupling", "channels"])
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


@pytest.mark.parametrize(
    "make", [lambda: CouplingFlow(4, 2, (8,)), lambda: AutoregressiveFlow(4, 2, (8,), actnorm=True)]
)
def test_flows_are_built_on_meta_and_loaded(make: Callable[[], Flow]) -> None:
    whole = make()
    whole.log_prob(torch.randn(30, 4))
    with torch.device("meta"):
        empty = make()
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
        (lambda: ops.channel_map(x, torch.eye(3), torch.zeros(3)), r"x must have shape \(batch, dim, …\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def linears(linear: str) -> InvertibleLinear:
    return InvertibleLinear(4, linear=linear)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{kind: (lambda kind=kind: linears(kind)) for kind in ("plu", "dense", "permutation")},
    "actnorm": lambda: ActNorm(4),
    "actnorm in eval mode": lambda: ActNorm(4).eval(),
    "affine coupling": lambda: AffineCoupling(4, MLP(2, [8], 4)),
    "fixed": lambda: FixedLinear(torch.eye(4)),
    "split": lambda: Split(4),
    "squeeze": lambda: Squeeze(),
    "coupling flow": lambda: CouplingFlow(4, 2, (8,)),
    "in eval mode": lambda: CouplingFlow(4, 2, (8,)).eval(),
    "dense flow": lambda: CouplingFlow(4, 2, (8,), linear="dense", actnorm=False),
    "inverse": lambda: Inverse(CouplingFlow(4, 2, (8,))),
    "layers": lambda: CouplingFlow(4, 2, (8,)).to_layers(),
    "ends in an actnorm": lambda: SequentialFlow([linears("dense"), ActNorm(4)], (4,)),
    "conditional": lambda: CouplingFlow(4, 2, (8,), context_dim=2),
    "embedded": lambda: Embedded(CouplingFlow(4, 2, (8,), context_dim=3), nn.Linear(2, 3), (2,)),
}
VALUES = {"list": [[0.0] * 4] * 3, "ndarray": np.zeros((3, 4), np.float32), "NoneType": None, "int": 3}


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_no_tensor_is_named(name: str, graded: bool) -> None:
    layer = LAYERS[name]()
    context = torch.zeros(3, 2) if name in ("conditional", "embedded") else None
    for kind, value in VALUES.items():
        for method in ("forward", "inverse", "log_prob"):
            if hasattr(layer, method):
                expected = f"^(x|z) must be a torch.Tensor; got {kind} "
                with pytest.raises(TypeError, match=expected), torch.set_grad_enabled(graded):
                    getattr(layer, method)(value, context)
        if context is not None and value is not None:
            with pytest.raises(TypeError, match=f"^context must be a torch.Tensor; got {kind} "):
                layer.log_prob(torch.zeros(3, 4), value)
            with pytest.raises(TypeError, match=f"^context must be a torch.Tensor; got {kind} "):
                layer.distribution(value)
    if isinstance(layer, CouplingFlow) and context is None:
        for run in (layer.distribution(validate_args=False).log_prob, FlowTransform(layer), FlowTransform(layer).inv):
            with pytest.raises(TypeError, match=r"^value must be a torch.Tensor; got ndarray "):
                run(VALUES["ndarray"])


@pytest.mark.parametrize("name", [*OPERATIONS, "actnorm", "linear", "plu"])
@pytest.mark.parametrize("graded", [False, True])
def test_what_is_no_tensor_is_named_by_operations(name: str, graded: bool) -> None:
    vectors = {
        "actnorm": (ops.actnorm_log_prob, lambda: [torch.zeros(3, 4), torch.zeros(4), torch.zeros(4)]),
        "linear": (ops.channel_map, lambda: [torch.zeros(3, 4), torch.eye(4), torch.zeros(4)]),
        "plu": (ops.plu_assemble, lambda: [torch.arange(3), torch.eye(3), torch.eye(3), torch.zeros(3), torch.ones(3)]),
    }
    run, make = {**OPERATIONS, **vectors}[name]
    places = range(len(make())) if name in ("coupling", "slogdet", "plu", "glow coupling") else (0,)
    for i in places:
        for change in (Tensor.tolist, Tensor.numpy):
            given = [t.detach() for t in make()]
            given[i] = change(given[i])
            expected = r"^\w+ must be a torch.Tensor; got (list|ndarray) "
            with pytest.raises(TypeError, match=expected), torch.set_grad_enabled(graded):
                run(*given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "name", ["plu", "dense", "permutation", "affine coupling", "in eval mode", "dense flow", "layers"]
)
def test_flows_are_traced_without_gradients(name: str) -> None:
    """With them torch compares two graphs, of which it makes the second without."""
    layer, x = LAYERS[name]().eval(), torch.randn(5, 4)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        x = torch.randn(5, 4)
        for got, wanted in zip(traced(x), layer(x), strict=True):
            torch.testing.assert_close(got, wanted)


class Subclass(Tensor):
    """A tensor of somebody's own class."""


@pytest.mark.parametrize("graded", [False, True])
def test_nothing_is_taken_without_a_check_that_the_kernels_do_not_make(graded: bool) -> None:
    """C++ sees no data of subclasses and of fake tensors, and so nothing that it could refuse."""
    x, A, c, _, *layers = tensors(3, 2, 5, 0, (7,))
    weights, biases = layers[:2], layers[2:]
    with torch.set_grad_enabled(graded):
        flow = CouplingFlow(5, 2, (7,), actnorm=False)
        with pytest.raises(ValueError, match="on meta"):
            ops.coupling_flow(x.as_subclass(Subclass), A, c, [w.to("meta") for w in weights], biases)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="x must have shape"):
            flow.log_prob(torch.empty(4, 7))
        for wrong in ((weights + biases, []), (weights + biases[:1], biases[1:]), ([], weights + biases)):
            with pytest.raises(ValueError, match="two lists of one length"):
                ops.coupling_flow(x, A, c, *wrong)
        whole = ops.coupling_flow_log_prob(x, A, c, torch.tensor(2), weights, biases)
        assert torch.equal(whole, ops.coupling_flow_log_prob(x, A, c, torch.tensor(2.0), weights, biases))
        with pytest.raises(TypeError, match=r"logabsdet must be a torch\.Tensor"):
            ops.coupling_flow_log_prob(x, A, c, np.float64(2), weights, biases)
        for bad in (1.5, None):
            with pytest.raises(TypeError, match=r"matrix must be a torch\.Tensor"):
                ops.coupling_flow(x, bad, c, weights, biases)
        with pytest.raises(ValueError, match=r"weights\[0\] must have shape"):
            ops.coupling_flow(x, A, c, weights, biases, torch.eye(3, dtype=torch.float64).to_sparse())
        transposed = [w.mT.contiguous().mT for w in weights]
        assert torch.equal(
            ops.coupling_flow(x, A, c, transposed, biases)[0], ops.coupling_flow(x, A, c, weights, biases)[0]
        )


def test_factors_that_nobody_trains_are_assembled_apart() -> None:
    flow, x = CouplingFlow(5, 2, (7,)), torch.randn(6, 5)
    want = flow.log_prob(x).detach()
    linear, (log_scale, bias) = flow._map_tensors()
    plu = Plu(**{name: t.detach() for name, t in linear.items()}, log_scale=log_scale.detach(), bias=bias.detach())
    weights, biases = ([t.detach() for t in found] for found in flow._mlp())
    assert torch.is_grad_enabled()
    torch.testing.assert_close(ops.plu_flow_log_prob(x, plu, weights, biases, **flow._options), want)
