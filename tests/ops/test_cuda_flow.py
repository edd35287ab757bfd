"""Small and medium coupling flows by CUDA kernels, without a GPU: on the host, a warp's lanes one after the other."""

import ctypes
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exact_flows import DIRECTIONS, error, names, run, tensors
from flow_values import tensors as made_tensors
from host_launches import launcher
from hypothesis import given, settings
from hypothesis import strategies as st
from nvrtc import check_that_nvrtc_compiles

from glf_fast import ops, reference
from glf_fast.ops.coupling_flow import cluster, cuda, cupy, small
from glf_fast.ops.coupling_flow.small import BF16, FLOAT32, TF32, FlowShape
from glf_fast.ops.linear import cupy as cupy_linear
from glf_fast.reference import ACTIVATIONS, LOG_SCALES

coupling_flow = importlib.import_module("glf_fast.ops.coupling_flow")  # whose name is also a function's

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library(host_flow) -> ctypes.CDLL:
    return host_flow


def h100(monkeypatch, major: int = 9) -> None:
    """What torch says of the GPU, whatever its index."""
    gpu = SimpleNamespace(major=major, shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    cuda._shared_bytes_once.cache_clear()


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def on_host(library, monkeypatch, request):
    """ops.coupling_flow … by these kernels, where they take the call: on two multiprocessors of an H100.

    NaN for what is unwritten. Lanes in either order.
    """
    launches: list[tuple[int, int]] = []
    monkeypatch.setattr(cupy_linear, "launch", launcher(library, lambda *block: launches.append(block)))
    monkeypatch.setattr(cupy_linear, "most_shared", lambda device: 227 << 10)
    monkeypatch.setattr(cupy_linear, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(small, "CUPY", True)
    monkeypatch.setattr(cluster, "most_rows", lambda s, gradients: 1000)  # whether or not they are faster
    h100(monkeypatch)
    ordinary = coupling_flow.kernels_for

    def kernels_for(x, call, *candidates):
        if cuda in candidates:
            assert not (why := cuda.refuses(call)), why
            return cuda
        return None if coupling_flow.cpp in candidates else ordinary(x, call, *candidates)

    monkeypatch.setattr(coupling_flow, "kernels_for", kernels_for)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    library.set_backwards(request.param)
    yield launches
    cuda._shared_bytes_once.cache_clear()
    library.set_backwards(False)
    library.set_truncating(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_float32_matmul_precision(precision)


def no_worse(values, tolerance: float, op: str = "coupling_flow", **options) -> None:
    exact = run(getattr(reference, op), values, torch.float64, **options)
    found = run(getattr(ops, op), values, torch.float32, **options)
    errors = {name: error(a, b) for name, a, b in zip(names(values), found, exact, strict=True)}
    assert max(errors.values()) < tolerance, errors


MEDIUM = [(64, (96, 70), 0), (41, (70,), 9), (33, (17, 65, 30), 3), (2, (200, 1, 66, 129), 0), (128, (512, 20), 64)]


@pytest.mark.parametrize("size", MEDIUM)
def test_values_and_gradients_of_medium_flows(on_host, size) -> None:
    """By clusters of eight blocks with eight warps, two of them for 17 rows."""
    dim, hidden, context = size
    no_worse(tensors("cpu", 17, 2, dim, context, hidden), 4e-6)
    assert [threads for threads, _ in on_host] == [256] * 3
    assert all(shared <= 227 << 10 for _, shared in on_host)


@pytest.mark.parametrize("size", [(20, (64, 64), 0), (7, (50, 33), 16), (31, (40, 64, 17), 3), (2, (5,), 1)])
def test_values_and_gradients(on_host, size) -> None:
    dim, hidden, context = size
    no_worse(tensors("cpu", 37, 3, dim, context, hidden), 2e-6)
    assert [threads for threads, _ in on_host] == [
        256,
        64,
        64,
    ]  # packing, and both ways: two multiprocessors share three warps


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add_first", [False, True])
def test_every_activation(on_host, activation: str, add_first: bool) -> None:
    no_worse(tensors("cpu", 17, 2, 9, 2, (33, 18)), 3e-6, activation=activation, add_first=add_first)


@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("add_first", [False, True])
def test_every_log_scale(on_host, log_scale: str, add_first: bool) -> None:
    values = tensors("cpu", 17, 2, 18, 0, (20,))
    no_worse(values, 5e-6, log_scale=log_scale, add_first=add_first)
    with torch.no_grad():  # there and back
        x, A, c, _, *layers = [None if t is None else t.float() for t in values]
        weights, biases = layers[:2], layers[2:]
        options = {"log_scale": log_scale, "add_first": add_first}
        z, logdet = ops.coupling_flow(x, A, c, weights, biases, **options)
        back, negative = ops.coupling_flow_inverse(z, torch.linalg.inv(A), c, weights, biases, **options)
    assert error(back, x.double()) < 2e-5 and error(negative, -logdet.double()) < 2e-5


@pytest.mark.parametrize("coupling", ["separate", "additive"])
def test_other_couplings(on_host, coupling: str) -> None:
    values = [None if t is None else t.detach() for t in made_tensors(17, 2, 9, 2, (32, 18), coupling=coupling)]
    no_worse(values, 3e-6, coupling=coupling, log_scale="glow")


def test_the_density_of_plu_layers(on_host) -> None:
    g = torch.Generator().manual_seed(0)
    x, _, _, context, *layers = tensors("cpu", 18, 3, 6, 2, (20, 9))
    normal = lambda *shape: torch.randn(3, *shape, generator=g).double() * 0.3  # noqa: E731
    floats = [normal(6, 6), normal(6, 6), normal(6), normal(6).sign(), normal(6), normal(6)]
    order = torch.rand(3, 6, generator=g).argsort(-1)
    weights = torch.randn(18, generator=g).double()
    results = []
    for module, dtype in ((ops, torch.float32), (reference, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_(i != 3) for i, t in enumerate([*floats, x, context, *layers])]
        plu = reference.Plu(order, *leaves[:6])
        x_, context_, *of_network = leaves[6:]
        density = module.plu_flow_log_prob(x_, plu, of_network[:3], of_network[3:], context_, activation="silu")
        asked = [t for t in leaves if t.requires_grad]
        results.append([density, *torch.autograd.grad((density * weights).sum(), asked)])
    errors = [error(a.detach(), b.detach()) for a, b in zip(*results, strict=True)]
    assert max(errors) < 5e-6, errors


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 2e-6), ("high", 3e-3), ("medium", 3e-2)])
@pytest.mark.parametrize("hidden", [(64, 33), (70, 33)], ids=["small", "medium"])
def test_both_ways_in_one_launch(on_host, hidden, precision: str, tolerance: float, activation: str) -> None:
    """The same, bit for bit, as in two."""
    torch.set_float32_matmul_precision(precision)
    values = tensors("cpu", 70, 2, 20, 3, hidden)
    x, A, c, context, *layers = [t.float() for t in values]
    map_precision, mlp_precision = {"highest": (FLOAT32,) * 2, "high": (TF32,) * 2, "medium": (FLOAT32, BF16)}[
        precision
    ]
    s = FlowShape(2, 20, 3, hidden, map_precision, mlp_precision, 1 if hidden[0] == 64 else 8)
    options = small.Options(activation, "tanh", 2.0, False, False, True)
    grad_logdet, grad_context = torch.linspace(-1, 1, 70), torch.empty_like(context)
    call = (s, options, x, A, c, None, layers[:3], layers[3:], context)
    _, density, kept, made = small.density_gradient(*call, grad_logdet, grad_context)
    parameters = small.parameter_gradients(s, kept, made)
    leaves = [t.requires_grad_() for t in (x, A, c, context, *layers)]
    found = ops.coupling_flow_log_prob(x, A, c, torch.zeros(()), layers[:3], layers[3:], context, activation=activation)
    grads = torch.autograd.grad((found * grad_logdet).sum(), leaves)
    assert torch.equal(density, found)
    for a, b in zip((made.x, *parameters[:2], grad_context, *parameters[2], *parameters[3]), grads, strict=True):
        assert torch.equal(a, b)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    x, A, c, context, *layers = exact
    log_prob = reference.coupling_flow_log_prob(
        x, A, c, torch.zeros(()), layers[:3], layers[3:], context, activation=activation
    )
    errors = [
        error(a, b) for a, b in zip(grads, torch.autograd.grad((log_prob * grad_logdet).sum(), exact), strict=True)
    ]
    assert error(density, log_prob.detach()) < tolerance and max(errors) < tolerance, errors


@pytest.mark.parametrize(("dim", "hidden"), [(20, (64, 64)), (64, (256, 256))], ids=["small", "medium"])
def test_float32_where_matrix_units_truncate(on_host, library, dim: int, hidden) -> None:
    """Sums of small terms are apart from those of large ones, so that few truncations meet a large sum."""
    values = tensors("cpu", 16, 3, dim, 0, hidden)
    exact = run(reference.coupling_flow, values, torch.float64)
    errors = []
    for truncating in (False, True):
        library.set_truncating(truncating)
        found = run(ops.coupling_flow, values, torch.float32)
        errors.append([error(a, b) for a, b in zip(found, exact, strict=True)])
    assert max(errors[1]) < 5e-6 and errors[0] != errors[1], errors


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [0, 1, 15, 16, 17, 300])
def test_every_batch(on_host, batch: int, direction: str) -> None:
    x, A, c, _, *layers = [None if t is None else t.float() for t in tensors("cpu", 300, 2, 11, 0, (24,), direction)]
    with torch.no_grad():
        op = DIRECTIONS[direction]
        found = getattr(ops, op)(x[:batch], A, c, layers[:2], layers[2:])
        exact = getattr(reference, op)(
            x[:batch].double(),
            A.double(),
            c.double(),
            *([t.double() for t in part] for part in (layers[:2], layers[2:])),
        )
    assert all(error(a, b) < 3e-6 for a, b in zip(found, exact, strict=True))
    assert not batch or all(threads <= 256 and shared <= 227 << 10 for threads, shared in on_host)


@pytest.mark.parametrize(("activation", "log_scale"), [("silu", "glow"), ("mish", "exp"), ("elu", "bayesflow")])
def test_options_of_medium_flows(on_host, activation: str, log_scale: str) -> None:
    """Options with and without a' beside the layers, there and back."""
    values = tensors("cpu", 17, 2, 36, 2, (33, 18))
    options = {"activation": activation, "log_scale": log_scale, "add_first": activation != "mish"}
    no_worse(values, 1e-5, **options)
    with torch.no_grad():
        x, A, c, context, *layers = [t.float() for t in values]
        z, logdet = ops.coupling_flow(x, A, c, layers[:3], layers[3:], context, **options)
        back, negative = ops.coupling_flow_inverse(
            z, torch.linalg.inv(A), c, layers[:3], layers[3:], context, **options
        )
    assert error(back, x.double()) < 2e-5 and error(negative, -logdet.double()) < 2e-5


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_medium_sizes(library, data) -> None:
    """Clusters of eight and of sixteen blocks, forward and inverse, in every precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cupy_linear, "launch", launcher(library, lambda *_: None))
        patch.setattr(cupy_linear, "most_shared", lambda device: 227 << 10)
        patch.setattr(small, "CUPY", True)
        steps, context, rows, blocks = (data.draw(st.integers(*ends)) for ends in ((1, 3), (0, 64), (1, 33), (1, 2)))
        dim = data.draw(st.integers(2, 128 // blocks))
        hidden = tuple(data.draw(st.lists(st.integers(1, 512), min_size=1, max_size=4)))
        tolerance, *precisions = data.draw(
            st.sampled_from([(2e-5, FLOAT32, FLOAT32), (1e-2, TF32, TF32), (5e-2, FLOAT32, BF16)])
        )
        inverse = data.draw(st.booleans())
        x, A, c, given_context, *layers = tensors("cpu", rows, steps, dim, context, hidden)
        half = len(layers) // 2
        run_reference = reference.coupling_flow_inverse if inverse else reference.coupling_flow
        exact, logdet = run_reference(x, A, c, layers[:half], layers[half:], given_context)
        s = FlowShape(steps, dim, context, hidden, *precisions, blocks=8 * blocks)
        options = small.Options("relu", "tanh", 2.0, False, inverse, False)
        floats = [None if t is None else t.float() for t in (x, A, c, None, given_context)]
        layers = [t.float() for t in layers]
        found = small.forward(s, options, *floats[:3], None, layers[:half], layers[half:], floats[4])
    assert error(found[0], exact) < tolerance and error(found[1], logdet) < tolerance


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_sizes(library, data) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cupy_linear, "launch", launcher(library, lambda *_: None))
        patch.setattr(cupy_linear, "most_shared", lambda device: 227 << 10)
        patch.setattr(cupy_linear, "multiprocessors", lambda device: data.draw(st.integers(1, 3)))
        patch.setattr(small, "CUPY", True)
        steps, dim, context, rows = (data.draw(st.integers(*ends)) for ends in ((1, 5), (2, 32), (0, 20), (1, 80)))
        hidden = tuple(data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=3)))
        x, A, c, given_context, *layers = tensors("cpu", rows, steps, dim, context, hidden)
        half = len(layers) // 2
        exact, logdet = reference.coupling_flow(x, A, c, layers[:half], layers[half:], given_context)
        s = FlowShape(steps, dim, context, hidden, FLOAT32, FLOAT32)
        options = small.Options("relu", "tanh", 2.0, False, False, False)
        floats = [None if t is None else t.float() for t in (x, A, c, None, given_context)]
        layers = [t.float() for t in layers]
        found = small.forward(s, options, *floats[:3], None, layers[:half], layers[half:], floats[4])
    assert error(found[0], exact) < 1e-5 and error(found[1], logdet) < 1e-5


def test_the_bytes_of_a_step(library) -> None:
    """The launchers and the device code agree about them."""
    for case in (
        FlowShape(3, 20, 5, (50, 33), FLOAT32, FLOAT32),
        FlowShape(1, 2, 0, (1,), TF32, TF32),
        FlowShape(2, 32, 33, (64, 64, 7, 1), FLOAT32, BF16),
        FlowShape(2, 40, 0, (128, 65), FLOAT32, BF16, blocks=8),
        FlowShape(3, 128, 64, (512, 1, 300), FLOAT32, FLOAT32, blocks=8),
        FlowShape(1, 33, 9, (100,), TF32, TF32, blocks=16),
    ):
        sizes = ctypes.c_int(), ctypes.c_int()
        library.unit_bytes(cupy._shape(case).ctypes.data_as(ctypes.c_void_p), *map(ctypes.byref, sizes))
        assert tuple(size.value for size in sizes) == small.unit_bytes(case)


def test_compiled_graphs_hold_both_passes(on_host) -> None:
    values = tensors("cpu", 20, 2, 8, 2, (16,))
    op = torch.compile(ops.coupling_flow, backend="aot_eager", fullgraph=True, dynamic=True)
    exact = run(reference.coupling_flow, values, torch.float64, activation="silu")
    found = run(op, values, torch.float32, activation="silu")
    assert max(error(a, b) for a, b in zip(found, exact, strict=True)) < 5e-6


def test_a_graph_that_is_kept_gives_the_same_again(on_host) -> None:
    x, A, c, _, *layers = [None if t is None else t.float() for t in tensors("cpu", 20, 2, 8, 0, (16,))]
    x.requires_grad_()
    z, logdet = ops.coupling_flow(x, A, c, layers[:2], layers[2:], activation="gelu")
    first, second = (torch.autograd.grad(z.sum() + logdet.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_left_to_others(monkeypatch) -> None:
    h100(monkeypatch)
    seen: dict[str, str] = {}

    def refused(name: str, dim=8, hidden=(16,), context=0, rows=20, op="coupling_flow", dtype=torch.float32, **options):
        x, A, c, ctx, *layers = (
            None if t is None else t.to(dtype) for t in tensors("cpu", rows, 1, dim, context, hidden)
        )
        monkeypatch.setattr(coupling_flow, "_run", lambda call: (seen.__setitem__(name, cuda.refuses(call)),) * 2)
        half = len(layers) // 2
        grad = options.pop("grad", False)
        getattr(ops, op)(x.requires_grad_(grad), A, c, layers[:half], layers[half:], ctx, **options)
        return seen[name]

    assert (
        not refused("small")
        and not refused("a gradient", grad=True)
        and not refused("inverse", op="coupling_flow_inverse")
    )
    assert "columns" in refused("wide", dim=129) and "hidden" in refused("broad", hidden=(513,))
    medium = {"dim": 64, "hidden": (256, 256)}
    assert not refused("medium", **medium) and not refused("medium, a gradient", grad=True, rows=768, **medium)
    assert "rows" in refused("many of a medium one", rows=257, **medium)
    assert "rows" in refused("a single layer", hidden=(65,)) and "rows" in refused("narrow layers", dim=33)
    assert "context" in refused("context", context=65) and "float64" in refused("double", dtype=torch.float64)
    assert "inverse" in refused("gradient of an inverse", op="coupling_flow_inverse", grad=True)
    assert "inverse" in refused("rebuilt", reversible=True, grad=True) and not refused("not rebuilt", reversible=True)
    assert "rows" in refused("many", rows=cuda.MAX_ROWS + 1)
    monkeypatch.setattr(cuda, "MAX_WORKSPACE", 1000)
    assert "workspace" in refused("memory", grad=True)
    deep = {"dim": 32, "hidden": (64, 64, 64, 64)}
    assert "shared memory" in refused("deep", **deep)
    monkeypatch.setattr(cuda, "_matmul_precision", lambda: "high")
    assert not refused("deep in tf32", **deep)
    h100(monkeypatch, major=8)
    assert "clusters" in refused("before clusters", **medium)
    h100(monkeypatch, major=7)
    assert "shared memory" in refused("an old GPU")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_bad_and_alone(on_host, bad: float) -> None:
    values = tensors("cpu", 40, 2, 9, 0, (33, 18))
    values[0][3, 1] = bad
    out, logdet, grad_x, *_ = run(ops.coupling_flow, values, torch.float32)
    for t in (out, logdet, grad_x):
        broken = ~t.isfinite().view(40, -1)
        assert broken[3].any() and broken.sum() == broken[3].sum()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (cupy.SOURCE, cupy.KERNELS[:2]),
        pytest.param(cupy.SOURCE, cupy.KERNELS, marks=pytest.mark.long),
        (cupy.CLUSTER_SOURCE, cupy.CLUSTER_KERNELS[:2]),
        pytest.param(cupy.CLUSTER_SOURCE, cupy.CLUSTER_KERNELS, marks=pytest.mark.long),
    ],
    ids=["two", "all", "two of clusters", "all of clusters"],
)
def test_nvrtc_compiles_the_kernels(source: str, names: tuple[str, ...]) -> None:
    check_that_nvrtc_compiles(source, names)
