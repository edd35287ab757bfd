"""The Triton kernels of the whole flow, interpreted, against the float64 reference, over the whole table of options."""

import itertools
import math
import mmap

import forked
import numpy as np
import pytest
import torch
import triton
from flow_values import DIRECTIONS, compare, derivatives, error, run, tensors
from hypothesis import strategies as st
from pairs import pairs
from random_examples import random_examples
from torch import Tensor

import glf_fast
from glf_fast import CouplingFlow, Spline, ops, reference, use_backend
from glf_fast.reference import ACTIVATIONS, LOG_SCALES

pytestmark = pytest.mark.usefixtures("interpreted")
# A formula is the same in every step, and has its tests with one; those of depths and shapes have several.


@pytest.mark.parametrize(("activation", "direction", "reversible"), pairs([*ACTIVATIONS], [*DIRECTIONS], [False, True]))
def test_every_activation(activation: str, direction: str, reversible: bool) -> None:
    compare(tensors(5, 1, 5, 1, (18, 3)), direction, 1e-12, reversible, activation=activation)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("add_first", [False, True])
@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_every_log_scale_in_both_orders(log_scale: str, add_first: bool, direction: str) -> None:
    """Inputs are rebuilt or saved in turns, so that each of the three meets both."""
    reversible = ([*LOG_SCALES].index(log_scale) + add_first + [*DIRECTIONS].index(direction)) % 2 == 1
    limit = 1e-11 if reversible else 1e-12
    compare(tensors(5, 1, 5, 0, (9,)), direction, limit, reversible, log_scale=log_scale, add_first=add_first)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("log_scale", [name for name, constant in LOG_SCALES.items() if constant is not None])
def test_constants(log_scale: str, direction: str) -> None:
    compare(tensors(5, 1, 4, 0, (9,)), direction, 1e-12, log_scale=log_scale, log_scale_constant=0.3)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("activation", "constant"), [("leaky_relu", 0.2), ("elu", 0.5)])
def test_constants_of_activations(activation: str, constant: float, direction: str) -> None:
    compare(tensors(5, 1, 4, 0, (9,)), direction, 1e-12, activation=activation, activation_constant=constant)


DEPTHS = [(40,), (17, 33), (70, 20), (5, 40, 18), (16, 17, 34, 3)]


@pytest.mark.parametrize(
    ("hidden", "context_dim", "direction", "reversible"), pairs(DEPTHS, [0, 17], [*DIRECTIONS], [False, True])
)
def test_every_depth(hidden: tuple[int, ...], context_dim: int, direction: str, reversible: bool) -> None:
    rows = 19 if context_dim else 3  # two programs, or one
    compare(tensors(rows, 2, 7, context_dim, hidden), direction, 1e-12, reversible, activation="silu")


@pytest.mark.parametrize(
    ("coupling", "log_scale", "direction", "reversible"),
    pairs(["separate", "additive"], ["tanh", "glow"], [*DIRECTIONS], [False, True]),
)
def test_other_couplings(coupling: str, log_scale: str, direction: str, reversible: bool) -> None:
    for hidden in ((9,), (17, 5, 20)):
        values = tensors(5, 2, 5, 2, hidden, coupling=coupling)
        compare(values, direction, 1e-12, reversible, coupling=coupling, log_scale=log_scale)


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_maps_too_wide_for_registers(direction: str, reversible: bool) -> None:
    compare(tensors(19, 2, 71, 0, (8,)), direction, 1e-12, reversible)


@random_examples(8, 100)
def test_shapes_strides_and_dtypes(data) -> None:
    draw = data.draw
    K, D, C = draw(st.integers(1, 3)), draw(st.integers(2, 35)), draw(st.sampled_from([0, 0, 1, 3, 16]))
    hidden = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    values = tensors(draw(st.sampled_from([0, 1, 2, 15, 16, 17, 33])), K, D, C, hidden, dtype)
    if draw(st.booleans()):  # input and weights with strides of their own
        for i in (0, 1, 4):
            values[i] = values[i].detach().mT.contiguous().mT.requires_grad_()
    reversible = draw(st.booleans())
    # Rebuilding inputs from outputs loses what the condition of the steps loses.
    limit = 1e-10 if dtype == torch.float64 else 1e-3 if reversible else 2e-5
    compare(
        values,
        draw(st.sampled_from(list(DIRECTIONS))),
        limit,
        reversible,
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        log_scale=draw(st.sampled_from(list(LOG_SCALES))),
        add_first=draw(st.booleans()),
    )


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_one_output_and_second_derivatives(direction: str, reversible: bool) -> None:
    """As the reference's, which are PyTorch's own; gradients of both outputs together are in all other tests."""

    def found(op, **options) -> list[Tensor]:
        def flow(x, A, c, context, *layers):
            half = len(layers) // 2
            return op(x, A, c, layers[:half], layers[half:], context, activation="gelu", **options)

        return derivatives(flow, tensors(3, 2, 5, 2, (7, 4)))

    name = DIRECTIONS[direction]
    ours, exact = found(getattr(ops, name), reversible=reversible), found(getattr(reference, name))
    for mine, truth in zip(ours, exact, strict=True):
        assert error(mine, truth) < 1e-10


def test_opcheck() -> None:
    library = torch.ops.glf_fast
    for density, logabsdet, spline in ((False, None, []), (True, torch.rand(2), Spline().prepared().numbers())):
        given = tensors(3, 2, 5, 2, (7,), torch.float32, coupling="spline" if spline else "affine")
        x, A, c, context, *layers = [t.detach() for t in given]
        weights, biases = layers[:2], layers[2:]
        code = ("relu", 0.0, "tanh", 2.0, False, False, density, spline, "")
        for save in (False, True):
            arguments = (x, A, c, logabsdet, weights, biases, context, *code, save)
            torch.library.opcheck(library.triton_coupling_flow.default, arguments)
        out, logdet, saved = library.triton_coupling_flow(*arguments)
        for state, unmatrix, parameters in ((saved, None, True), (out, torch.linalg.inv(A).contiguous(), False)):
            torch.library.opcheck(
                library.triton_coupling_flow_backward.default,
                (out, logdet, state, A, unmatrix, c, weights, biases, context, *code, parameters, parameters),
            )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("activation", "log_scale"), [(a, "tanh") for a in ACTIVATIONS] + [("relu", f) for f in LOG_SCALES if f != "tanh"]
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, from the interpreter
def test_nan_and_inf_pass_through_as_in_plain_pytorch(activation: str, log_scale: str, bad: float) -> None:
    x, A, c, _, *layers = [None if t is None else t.detach() for t in tensors(20, 1, 5, 0, (9,), torch.float32)]
    x[3, 1] = bad
    results = [
        op(x, A, c, layers[:2], layers[2:], activation=activation, log_scale=log_scale)
        for op in (ops.coupling_flow, reference.coupling_flow)
    ]
    for mine, theirs in zip(*results, strict=True):
        finite = [t.isfinite().view(20, -1).all(1) for t in (mine, theirs)]
        assert torch.equal(*finite) and finite[0].sum() >= 19


def test_a_bad_row_harms_no_other_gradient() -> None:
    values = tensors(20, 2, 5, 0, (9, 9), torch.float32)
    with torch.no_grad():
        values[0][3, 1] = float("nan")
    out, logdet, grad_x, *_ = run(ops.coupling_flow, values)
    for t in (out, logdet, grad_x):
        bad = t.isnan().view(20, -1)
        assert bad[3].all() and bad.sum() == bad[3].numel()


# The parameters are packed before, and summed over rows behind: one launch is that of all steps.
FORWARD, BACKWARD = ["pack_kernel", "flow_kernel"], ["pack_kernel", "flow_backward_kernel", "sums_kernel"]


@pytest.mark.parametrize("reversible", [False, True])
def test_one_launch_in_each_direction(reversible: bool) -> None:
    from glf_fast.kernels.launch import count_launches

    for direction in DIRECTIONS.values():
        for steps, hidden in ((1, (8,)), (3, (8, 8)), (2, (8, 8, 8, 8))):
            rows = 17 if steps == 1 else 3  # two programs, or one
            x, A, c, context, *layers = tensors(rows, steps, 6, 3, hidden)
            half = len(layers) // 2
            with count_launches() as launched:
                out, logdet = getattr(ops, direction)(
                    x, A, c, layers[:half], layers[half:], context, reversible=reversible
                )
            assert launched == FORWARD
            with count_launches() as launched:
                (out.sum() + logdet.sum()).backward()
            assert launched == BACKWARD
    flow = CouplingFlow(6, 3, (8, 8), linear="permutation", reversible=reversible)
    flow(torch.randn(20, 6))
    with count_launches() as launched:
        flow.log_prob(torch.randn(17, 6)).sum().backward()
    assert launched == FORWARD + BACKWARD


def test_reversible_memory_does_not_grow_with_the_steps() -> None:
    def saved(K: int, reversible: bool) -> int:
        sizes: list[int] = []
        values = tensors(64, K, 6, 0, (8,), torch.float32)
        parameters = {t.data_ptr() for t in values if t is not None}
        x, A, c, _, *layers = values
        pack = lambda t: sizes.append(0 if t.data_ptr() in parameters else t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ops.coupling_flow(x, A, c, layers[:2], layers[2:], reversible=reversible)
        return sum(sizes)

    assert saved(9, True) == saved(2, True) == 64 * 6
    assert saved(9, False) == 9 * 64 * 6


def test_results_repeat_exactly() -> None:
    values = tensors(60, 2, 20, 0, (40, 40), torch.float32)
    for a, b in zip(run(ops.coupling_flow, values), run(ops.coupling_flow, values), strict=True):
        assert torch.equal(a, b)


def test_only_what_is_asked_for_is_differentiated() -> None:
    x, A, c, context, *layers = tensors(5, 2, 5, 2, (9,))
    fixed = [t.detach() for t in (A, c, *layers)]
    out, logdet = ops.coupling_flow(x, *fixed[:2], fixed[2:4], fixed[4:], context)
    want = torch.autograd.grad(reference.coupling_flow(x, *fixed[:2], fixed[2:4], fixed[4:], context), [x, context],
                               (out.detach(), logdet.detach()))  # fmt: skip
    got = torch.autograd.grad((out, logdet), [x, context], (out.detach(), logdet.detach()))
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning")  # raised inside inductor
def test_compiled_without_graph_breaks_for_any_batch() -> None:
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)  # inductor would refuse to fill memory
    torch.manual_seed(0)
    flow = CouplingFlow(5, 2, (9,), context_dim=1)
    flow(torch.randn(20, 5), torch.randn(20, 1))
    compiled = torch.compile(flow, fullgraph=True, dynamic=True)
    for batch in (4, 7):
        x, context = torch.randn(batch, 5, requires_grad=True), torch.randn(batch, 1)
        results = []
        for f in (compiled, flow):
            z, logdet = f(x, context)
            results.append([z, logdet, *torch.autograd.grad((z**2).sum() + logdet.sum(), [x, *flow.mlp_weights])])
        for a, b in zip(*results, strict=True):
            assert error(a, b) < 1e-5
    torch.compiler.reset()


def test_matmul_precisions_are_followed_and_bf16_is_refused_here(monkeypatch) -> None:
    from glf_fast.kernels import packing

    precisions: list[tuple[str, str]] = []
    launch = packing.launch

    def spy(*args, **options):
        precisions.append((options["MAP"], options["MLP"]))
        launch(*args, **options)

    monkeypatch.setattr(packing, "launch", spy)
    x, A, c, _, *layers = [None if t is None else t.detach() for t in tensors(3, 1, 4, 0, (8,), torch.float32)]

    def call() -> Tensor:
        return ops.coupling_flow(x, A, c, layers[:2], layers[2:])[0]

    call()
    with torch.autocast("cpu", torch.float16):
        assert call().dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="computes bfloat16 products wrongly"):
        call()
    try:
        torch.set_float32_matmul_precision("high")
        call()
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(RuntimeError, match="computes bfloat16 products wrongly"):
            call()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precisions == [
        ("tf32x3", "tf32x3"), ("tf32x3", "tf32"), ("tf32x3", "bf16"), ("tf32", "tf32"), ("tf32", "bf16")
    ]  # fmt: skip


def test_distances_beyond_32_bits(monkeypatch) -> None:
    """Rows and steps more than 2³¹ numbers apart, in tensors that are address space but for the pages that are touched."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from glf_fast.kernels.coupling_flow import flow_kernel
    from glf_fast.kernels.coupling_flow_backward import flow_backward_kernel
    from glf_fast.kernels.flow_options import FlowOptions, sizes
    from glf_fast.kernels.packing import pack

    def vast(*shape: int) -> Tensor:
        size = 4 * math.prod(shape)
        no_reserve = 0x4000  # of Linux; mmap has the name from Python 3.13 on
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float32).view(shape)

    K, D, rows, program = 3, 2, 2**31 + 5, 2**31 // 16
    x, A, c, _, *layers = [None if t is None else t.detach() for t in tensors(5, K, D, 0, (16, 16), torch.float32)]
    last = slice(rows - 5, rows)
    given_x, out, grad_x = vast(rows, D), vast(rows, D), vast(rows, D)
    given_x[last] = x
    logdet, saved = vast(rows), vast(K, rows, D)
    options = FlowOptions("relu", "tanh", 2.0, False, False, "ieee", "ieee")
    packed = pack(A, None, c, None, layers[:3], layers[3:], sizes(D, (16, 16), 0), options)
    constants = {**sizes(D, (16, 16), 0), **options.constants(), "BM": 16, "BN": 16, "BK": 16, "GROUP": 16}
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_get_program_id",
        lambda self, axis: TensorHandle(np.array([program], np.int32), triton.language.int32),
    )
    parameters = (packed.maps, packed.weights, packed.vectors)
    flow_kernel[(1,)](given_x, *parameters, x, out, logdet, saved, x, 0, rows, K, **constants, SAVE=True, STAGED=False)
    values = [t.requires_grad_() if t is not None else None for t in (x, A, c, None, *layers)]
    want, want_logdet, want_grad_x, *_ = run(reference.coupling_flow, values)
    assert error(out[last], want) < 1e-5 and error(logdet[last], want_logdet) < 1e-5

    stride = constants["ROW_STRIDE"]
    hidden, slopes = vast(K, rows, stride), vast(K, rows, stride)
    map_grad, grad_out = vast(K, rows, D), vast(rows, D)
    g = torch.Generator().manual_seed(1)  # as in `run`
    grad_out[last], logdet[last] = (torch.randn(s, dtype=torch.float64, generator=g).float() for s in ((5, D), (5,)))
    flow_backward_kernel[(1,)](
        grad_out, logdet, grad_x, saved, x, packed.maps, *parameters, x, hidden, slopes, saved, map_grad, 0, 0, rows, rows,
        K, **constants, SAVED=True,
    )  # fmt: skip
    assert error(grad_x[last], want_grad_x) < 1e-5


def test_a_flow_uses_the_kernels_and_learns_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    data = torch.randn(2, 32, 4, generator=g, dtype=torch.float64)
    data[..., 1] = data[..., 0] ** 2 + 0.1 * data[..., 1]

    def curve(backend: str) -> Tensor:
        torch.manual_seed(0)
        flow = CouplingFlow(4, 2, (16,)).double()
        optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
        losses = []
        with use_backend(backend):
            for i in range(10):
                loss = -flow.log_prob(data[i % 2]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return torch.tensor(losses)

    exact = curve("reference")
    assert exact[-1] < exact[0] - 0.1
    torch.testing.assert_close(curve("triton"), exact, rtol=1e-9, atol=1e-9)


def test_the_launch_table_answers_for_every_flow(monkeypatch) -> None:
    from glf_fast.kernels import launch_table

    for arch in (80, 90, 100):
        monkeypatch.setattr(launch_table, "architecture", lambda index, arch=arch: str(arch))
        for dim, width, layers, precision, batch in itertools.product(
            (2, 33, 65, 129, 256), (1, 65, 257, 512), (1, 2, 3, 4), launch_table.PRECISIONS, (1, 4096, 4097, 10**6)
        ):
            for backward in (False, True):
                how = launch_table.launch_for(backward, dim, (width,) * layers, precision, batch, torch.device("cuda"))
                assert all(n >= 16 and n & (n - 1) == 0 for n in (how.rows, how.columns, how.depth))
                assert how.staged or layers <= 2


def test_nothing_imports_triton_before_a_kernel_runs() -> None:
    code = """
import sys, torch, glf_fast
flow = glf_fast.CouplingFlow(4, 1, (8,))
flow.log_prob(torch.randn(3, 4))
assert "triton" not in sys.modules
with glf_fast.use_backend("triton"):
    flow.log_prob(torch.randn(3, 4))
assert "triton" in sys.modules
"""
    done = forked.fresh(code)
    assert done.returncode == 0, done.stderr


def test_without_the_interpreter_a_processor_tensor_is_refused() -> None:
    code = """
import os, torch
os.environ["TRITON_INTERPRET"] = "0"
torch.version.cuda = torch.version.cuda or "13.0"  # as a torch with CUDA would say
import glf_fast
print(glf_fast.backends()["triton"])
with glf_fast.use_backend("triton"):
    glf_fast.CouplingFlow(4, 1, (8,))(torch.randn(3, 4))
"""
    done = forked.fresh(code)
    assert done.returncode == 1 and done.stdout.startswith("ready: float32 on CUDA")
    assert "RuntimeError: backend 'triton' was asked for, and the tensors are on the processor" in done.stderr
    assert glf_fast.backends()["triton"].startswith("ready: interpreted")
