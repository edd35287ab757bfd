"""The Triton kernels of the whole flow, interpreted, against the float64 reference, over the whole table of options."""

import itertools
import math
import mmap
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
from flow_values import error, run, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import glf_fast
from glf_fast import CouplingFlow, ops, reference, use_backend
from glf_fast.reference import ACTIVATIONS, LOG_SCALES

pytestmark = pytest.mark.usefixtures("interpreted")

DIRECTIONS = {"forward": "coupling_flow", "inverse": "coupling_flow_inverse"}


def compare(values: list[Tensor | None], direction: str, limit: float, reversible: bool = False, **options) -> None:
    """Output, logdet and every gradient against the reference on the same numbers in float64."""
    exact = [None if t is None else t.detach().double().requires_grad_() for t in values]
    want = run(getattr(reference, DIRECTIONS[direction]), exact, **options)
    got = run(getattr(ops, DIRECTIONS[direction]), values, **options, reversible=reversible)
    for mine, truth in zip(got, want, strict=True):
        assert mine.dtype == values[0].dtype and mine.shape == truth.shape
        assert error(mine, truth) <= limit


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, direction: str, reversible: bool) -> None:
    compare(tensors(5, 2, 5, 1, (18, 3)), direction, 1e-12, reversible, activation=activation)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("add_first", [False, True])
@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_every_log_scale_in_both_orders(log_scale: str, add_first: bool, direction: str) -> None:
    compare(tensors(5, 2, 5, 0, (9,)), direction, 1e-12, log_scale=log_scale, add_first=add_first)
    compare(tensors(5, 2, 5, 0, (9,)), direction, 1e-11, True, log_scale=log_scale, add_first=add_first)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("log_scale", [name for name, constant in LOG_SCALES.items() if constant is not None])
def test_constants(log_scale: str, direction: str) -> None:
    compare(tensors(5, 2, 4, 0, (9,)), direction, 1e-12, log_scale=log_scale, log_scale_constant=0.3)


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("context_dim", [0, 17])
@pytest.mark.parametrize("hidden", [(40,), (17, 33), (70, 20), (5, 40, 18), (16, 17, 34, 3)])
def test_every_depth(hidden: tuple[int, ...], context_dim: int, direction: str, reversible: bool) -> None:
    compare(tensors(19, 2, 7, context_dim, hidden), direction, 1e-12, reversible, activation="silu")


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("log_scale", ["tanh", "glow"])
@pytest.mark.parametrize("coupling", ["separate", "additive"])
def test_other_couplings(coupling: str, log_scale: str, direction: str, reversible: bool) -> None:
    for hidden in ((9,), (17, 5, 20)):
        values = tensors(5, 2, 5, 2, hidden, coupling=coupling)
        compare(values, direction, 1e-12, reversible, log_scale=log_scale)


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_maps_too_wide_for_registers(direction: str, reversible: bool) -> None:
    compare(tensors(19, 2, 71, 0, (8,)), direction, 1e-12, reversible)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
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
def test_gradcheck(direction: str, reversible: bool) -> None:
    op = getattr(ops, DIRECTIONS[direction])

    def flow(x, A, c, context, *layers):
        half = len(layers) // 2
        return op(x, A, c, layers[:half], layers[half:], context, activation="gelu", reversible=reversible)

    values = tensors(3, 2, 5, 2, (7, 4))
    assert gradcheck(flow, values, fast_mode=True)
    if not reversible:  # the second derivatives are the reference's
        assert gradgradcheck(flow, values, fast_mode=True)


def test_opcheck() -> None:
    x, A, c, context, *layers = [t.detach() for t in tensors(3, 2, 5, 2, (7,), torch.float32)]
    weights, biases = layers[:2], layers[2:]
    library = torch.ops.glf_fast
    for density, logabsdet in ((False, None), (True, torch.rand(2))):
        code = ("relu", "tanh", 2.0, False, False, density, "")
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
        for steps, hidden in ((1, (8,)), (5, (8, 8)), (2, (8, 8, 8, 8))):
            x, A, c, context, *layers = tensors(17, steps, 6, 3, hidden)
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


@pytest.mark.parametrize(("rows", "parts"), [(8192, 8), (8193, 1), (1024 * 6, 4), (1000, 1)])
def test_sums_over_many_rows_go_in_parts(rows: int, parts: int, monkeypatch) -> None:
    from glf_fast.kernels import coupling_flow_backward

    # (K, rows, n) inside wider rows, as in the workspace; the right operand's steps lie further apart, as saved inputs do.
    a = torch.randn(2, rows, 9, dtype=torch.float64)[..., 2:7]
    b = torch.randn(2, rows + 5, 3, dtype=torch.float64)[:, 5:]
    seen: list[int] = []
    plain = coupling_flow_backward._bmm
    monkeypatch.setattr(coupling_flow_backward, "_bmm", lambda x, y: (seen.append(len(x)), plain(x, y))[1])
    torch.testing.assert_close(coupling_flow_backward._over_rows(a, b, 18), a.mT @ b)
    assert seen == [2 * parts]


def test_large_batches_and_deep_flows_go_in_portions(monkeypatch) -> None:
    from glf_fast.kernels import coupling_flow_backward
    from glf_fast.kernels.launch import count_launches

    values = tensors(40, 3, 5, 2, (9, 9))
    whole = run(ops.coupling_flow, values, activation="silu")
    monkeypatch.setattr(coupling_flow_backward, "WORKSPACE_BYTES", 1)
    for direction, reversible in itertools.product(DIRECTIONS, (False, True)):
        compare(values, direction, 1e-12, reversible, activation="silu")
    with count_launches() as launched:
        portions = run(ops.coupling_flow, values, activation="silu")
    assert launched.count("flow_backward_kernel") == 9  # 16 rows and one step each
    assert launched.count("pack_kernel") == 1 + 3
    for a, b in zip(portions, whole, strict=True):
        assert error(a, b) < 1e-14


def test_the_workspace_stays_within_its_bound(monkeypatch) -> None:
    from glf_fast.kernels import coupling_flow_backward

    monkeypatch.setattr(coupling_flow_backward, "WORKSPACE_BYTES", 60_000)
    x, A, c, context, *layers = tensors(100, 4, 6, 3, (32, 16), torch.float32)
    out, logdet = ops.coupling_flow(x, A, c, layers[:3], layers[3:], context)
    sizes: list[int] = []
    places: set[tuple[int, int]] = set()
    launch = coupling_flow_backward.launch

    def spy(kernel, programs, device, *args, **options):
        *_, hidden, slopes, _, map_grad, _, _, _, _, _ = args
        sizes.append(sum(t.numel() * t.itemsize for t in (hidden, slopes, map_grad)))
        places.add((hidden.untyped_storage().data_ptr(), map_grad.untyped_storage().data_ptr()))
        launch(kernel, programs, device, *args, **options)

    monkeypatch.setattr(coupling_flow_backward, "launch", spy)
    (out.sum() + logdet.sum()).backward()
    assert len(sizes) > 2 and 30_000 < max(sizes) <= 60_000
    assert len(places) == 1  # the same memory for every portion


def test_portions_fill_the_gpu_and_then_the_workspace() -> None:
    from glf_fast.kernels.coupling_flow_backward import WORKSPACE_BYTES, portions
    from glf_fast.kernels.launch_table import Launch

    few, many = Launch(16, 64, 64, True, 8, 3), Launch(32, 64, 64, True, 4, 3)
    of_cifar, of_mnist = (
        2 * 4 * 576 + 256,
        2 * 4 * 144 + 80,
    )  # bytes of a row and step in float32: D 64, H 256; D 20, H 64
    assert portions(256, 8, of_cifar, few, 132) == (256, 8)
    assert portions(0, 8, of_cifar, few, 132) == (1, 8)
    for batch, steps, row_bytes, how in itertools.product(
        (1, 200, 4096, 65_536, 1_000_001), (1, 5, 8, 64), (of_cifar, of_mnist), (few, many)
    ):
        rows, group = portions(batch, steps, row_bytes, how, 132)
        wave = how.rows * 132 * (8 // how.num_warps)
        assert 1 <= group <= steps and (rows == batch or rows % how.rows == 0)
        assert rows * group * row_bytes <= max(WORKSPACE_BYTES, wave * row_bytes)
        assert rows >= min(batch, wave // 2)  # equal portions, of which none leaves half of the GPU idle
    # 4,096 rows of 64 steps, the memory goal: 2 steps a launch instead of all.
    assert portions(4096, 64, of_cifar, many, 132) == (4096, 2)


@pytest.mark.parametrize("rows", [1, 700, 1500])
def test_sums_of_a_workspace(rows: int) -> None:
    from glf_fast.kernels.flow_options import sizes
    from glf_fast.kernels.sums import column_sums

    constants = sizes(5, (33, 7), 2)
    columns, stride = constants["COLUMNS"], constants["ROW_STRIDE"]
    g = torch.Generator().manual_seed(0)
    sums = column_sums(4, rows, constants, True, torch.empty(0, dtype=torch.float64))
    assert sums.parts == (2 if rows > 1024 else 1)
    want = []
    for start, portion in ((2, rows), (0, rows // 2 + 1), (2, 3)):
        slopes = torch.full((2, portion, stride), float("nan"), dtype=torch.float64)  # as what nobody writes
        widths = dict(zip(columns, (33, 7, 4), strict=True))
        for at, n in widths.items():
            slopes[..., at : at + n] = torch.randn(2, portion, n, generator=g, dtype=torch.float64)
        map_grad = torch.randn(2, portion, 5, generator=g, dtype=torch.float64)
        grad = torch.randn(portion, generator=g, dtype=torch.float64)
        sums.add(slopes, map_grad, grad, start, accumulate=len(want) == 2)
        found = [slopes[..., at : at + n].sum(1) for at, n in widths.items()]
        want.append([*found, map_grad.sum(1), grad.sum().expand(2)])
    for total, a, b, c in zip(sums.totals(), *want, strict=True):
        torch.testing.assert_close(total, torch.cat([b, a + c]), rtol=1e-12, atol=1e-12)


def test_packed_parameters_are_padded_with_zeros_and_hold_every_number() -> None:
    from glf_fast.kernels.flow_options import FlowOptions, sizes
    from glf_fast.kernels.packing import pack

    _, A, c, _, *layers = [None if t is None else t.detach() for t in tensors(1, 3, 7, 5, (33, 18))]
    constants = sizes(7, (33, 18), 5)
    options = FlowOptions("relu", "tanh", 2.0, False, False, "ieee", "ieee")
    logs = torch.randn(3, dtype=torch.float64)
    for log in (None, logs, logs[0]):
        packed = pack(A, -A, c, log, layers[:3], layers[3:], constants, options)
        wide = torch.zeros(3, 2, 32, 32, dtype=torch.float64)
        at = torch.tensor([0, 1, 2, 3, 16, 17, 18])  # p of 4, v of 3, each padded to 16
        wide[:, 0, at[:, None], at] = A
        assert torch.equal(packed.maps.view(3, 32, 32), wide[:, 0]) and torch.equal(packed.unmaps, -packed.maps)
        of_input = torch.tensor([0, 1, 2, 3, *range(16, 21)])  # p, then the context
        shapes = [(32, 48, of_input, torch.arange(33)), (48, 32, torch.arange(33), torch.arange(18))]
        shapes.append((32, 32, torch.arange(18), torch.tensor([0, 1, 2, 16, 17, 18])))  # [u | t]
        for i, (n, m, rows, columns) in enumerate(shapes):
            want = torch.zeros(3, n, m, dtype=torch.float64)
            want[:, rows[:, None], columns] = layers[i]
            assert torch.equal(
                packed.weights[:, constants["WEIGHTS"][i] : constants["WEIGHTS"][i + 1]], want.flatten(1)
            )
        want = torch.zeros(3, constants["VECTORS"][-1], dtype=torch.float64)
        want[:, at] = c
        for i, columns in enumerate((torch.arange(33), torch.arange(18), shapes[2][3])):
            want[:, constants["VECTORS"][i + 1] + columns] = layers[3 + i]
        if log is not None:
            want[: log.numel(), constants["VECTORS"][4]] = log
        assert torch.equal(packed.vectors, want)


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


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning")  # raised inside inductor
def test_compiled_without_graph_breaks_for_any_batch(compiler: str) -> None:
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)  # inductor would refuse to fill memory
    torch.manual_seed(0)
    flow = CouplingFlow(5, 2, (9,), context_dim=1)
    flow(torch.randn(20, 5), torch.randn(20, 1))
    compiled = torch.compile(flow, fullgraph=True, dynamic=True, backend=compiler)
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
    constants = {**sizes(D, (16, 16), 0), **options.constants(), "BM": 16, "BN": 16, "BK": 16}
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
    from glf_fast.kernels.shipped import shipped

    for arch in (80, 90, 100):
        monkeypatch.setattr(launch_table, "architecture", lambda index, arch=arch: str(arch))
        for dim, width, layers, precision, batch in itertools.product(
            (2, 33, 65, 129, 256), (1, 65, 257, 512), (1, 2, 3, 4), launch_table.PRECISIONS, (1, 4096, 4097, 10**6)
        ):
            for backward in (False, True):
                how = launch_table.launch_for(backward, dim, (width,) * layers, precision, batch, torch.device("cuda"))
                assert all(n >= 16 and n & (n - 1) == 0 for n in (how.rows, how.columns, how.depth))
                assert how.staged or layers <= 2
        assert len({spec.name for spec in shipped(arch)}) == 3 * 4 * 3 * 2 + 6 + (5 * 2 * 8 if arch == 90 else 0)


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
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("ready: float32 on CUDA")
    assert "RuntimeError: backend 'triton' was asked for, and the tensors are on the processor" in done.stderr
    assert glf_fast.backends()["triton"].startswith("ready: interpreted")
