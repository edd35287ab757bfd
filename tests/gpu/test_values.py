"""On a GPU: values and gradients of the kernels against float64, in every precision."""

from contextlib import nullcontext

import autoregressive_flows
import flow_values
import pytest
import torch
from autoregressive_flows import NAMES, flow_of
from coupling_cases import COUPLINGS
from exact_flows import DIRECTIONS, SIZES, error, names, run, tensors
from matrix_units import DEPTH, TruncatingUnits

from glf_fast import ops, reference, use_backend
from glf_fast.kernels.launch import count_launches
from glf_fast.reference import ACTIVATIONS, PARAMETRIZATIONS, TAILS, Spline

pytestmark = pytest.mark.gpu

# name → torch's matmul precision and autocast: of ours, and of plain PyTorch in the same precision. "medium" is bf16 operands
# to us, while cuBLAS makes no difference between "high" and "medium".
PRECISIONS = {
    "highest": (("highest", None), ("highest", None)),
    "high": (("high", None), ("high", None)),
    "medium": (("medium", None), ("high", torch.bfloat16)),
    "bfloat16 autocast": (("highest", torch.bfloat16), ("highest", torch.bfloat16)),
    "float16 autocast": (("highest", torch.float16), ("highest", torch.float16)),
}


def rehearsed(device: torch.device) -> bool:
    return device.type == "cpu"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_at_most_twice_the_error_of_plain_pytorch(precision: str, direction: str, size: str, device) -> None:
    """In full precision: of plain PyTorch on matrix units, whose sums are truncated (tests/common/matrix_units.py).

    cuBLAS computes full precision without them, by rounded multiply-adds, and is 4 to 13 times as exact.
    """
    if rehearsed(device) and (precision != "highest" or size in ("medium", "large", "huge")):
        pytest.skip(
            "on a processor plain PyTorch has no tf32, the interpreter no bfloat16, and wide flows take minutes"
        )
    dim, hidden, context = SIZES[size]
    rows = 18 if rehearsed(device) else 290  # no layer's width
    values = tensors(device, rows, 3, dim, context, hidden, direction)
    ours, plain = PRECISIONS[precision]
    exact = run(getattr(reference, DIRECTIONS[direction]), values, torch.float64)
    errors = []
    for module, (setting, autocast) in ((ops, ours), (reference, plain)):
        truncating = module is reference and precision == "highest" and not rehearsed(device)
        torch.set_float32_matmul_precision(setting)
        with (
            torch.autocast(device.type, autocast, enabled=autocast is not None),
            TruncatingUnits(DEPTH, rows) if truncating else nullcontext(),
        ):
            found = run(getattr(module, DIRECTIONS[direction]), values, torch.float32)
        errors.append([error(a, b) for a, b in zip(found, exact, strict=True)])
    ulp = torch.finfo(torch.float32).eps  # where plain PyTorch happens to be exact
    worse = {n: (a, b) for n, a, b in zip(names(values), *errors, strict=True) if not a <= 2 * b + ulp}
    assert not worse, f"(ours, plain): {worse}"


@pytest.mark.parametrize("batch", [1, 15, 16, 129, 5000, 100_000])
@pytest.mark.parametrize("reversible", [False, True])
def test_every_batch_writes_all_of_its_results(batch: int, reversible: bool, device, poisoned) -> None:
    if rehearsed(device) and batch > 16:
        pytest.skip("the interpreter takes minutes for this batch")
    values = tensors(device, batch, 2, 20, 0, (64, 64))
    exact = run(reference.coupling_flow, values, torch.float64)
    for ours, theirs in zip(run(ops.coupling_flow, values, torch.float32, reversible=reversible), exact, strict=True):
        assert error(ours, theirs) < (1e-4 if reversible else 2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, device) -> None:
    values = tensors(device, 17, 2, 9, 2, (33, 18))
    exact = run(reference.coupling_flow, values, torch.float64, activation=activation)
    for ours, theirs in zip(run(ops.coupling_flow, values, torch.float32, activation=activation), exact, strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("coupling", ["separate", "additive"])
def test_other_couplings(coupling: str, direction: str, device) -> None:
    made = flow_values.tensors(17, 2, 9, 2, (33, 18), coupling=coupling)
    values = [None if t is None else t.detach().to(device) for t in made]
    op = DIRECTIONS[direction]
    options = {"coupling": coupling, "log_scale": "glow"}
    exact = run(getattr(reference, op), values, torch.float64, **options)
    for ours, theirs in zip(run(getattr(ops, op), values, torch.float32, **options), exact, strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("batch", "dim", "hidden", "spline"),
    [
        (17, 9, (33, 18), Spline(10, tails="none", parametrization="nflows")),
        (5000, 20, (64, 64), Spline(8)),
        (1000, 64, (256, 256), Spline(8, tails="circular", parametrization="zuko")),
    ],
)
def test_flows_of_splines(batch, dim, hidden, spline, direction: str, reversible: bool, device, poisoned) -> None:
    """In one launch each way. A number that rounding puts on the other side of a knot has another gradient."""
    if rehearsed(device) and batch > 17:
        pytest.skip("the interpreter takes minutes for this batch")
    made = flow_values.tensors(batch, 2, dim, 2, hidden, coupling="spline", spline=spline)
    values = [t.detach().to(device) for t in made]
    options = {"coupling": "spline", "activation": "silu", "spline": spline}
    exact = run(getattr(reference, DIRECTIONS[direction]), values, torch.float64, **options)
    with count_launches() as launches:
        found = run(getattr(ops, DIRECTIONS[direction]), values, torch.float32, reversible=reversible, **options)
    assert launches.count("flow_kernel") == 1 and "flow_backward_kernel" in launches
    for name, ours, theirs in zip(names(values), found, exact, strict=True):
        assert error(ours, theirs) < (1e-4 if name in ("out", "logdet") else 1e-2), name


# Rows, steps, D, context, hidden widths, how it is made: sbi's default and its samples, a wide one, splines of both.
AUTOREGRESSIVE = [
    ((17, 2, 3, 2, (9, 5)), {"context_layer": True}),
    ((200, 5, 10, 16, (50, 50, 50)), {"context_layer": True}),
    ((10_000, 2, 10, 16, (50, 50)), {}),
    ((5_000, 2, 32, 0, (128, 128)), {"ties": True}),
    ((300, 2, 256, 3, (512,)), {}),
    ((17, 1, 3, 2, (5,)), {"transform": "spline"}),
    (
        (5_000, 2, 10, 3, (50, 50)),
        {"transform": "spline", "spline": Spline(10, tails="none", parametrization="nflows")},
    ),
]


@pytest.mark.parametrize("inverse", NAMES)
@pytest.mark.parametrize(("shape", "made"), AUTOREGRESSIVE)
def test_autoregressive_flows(shape, made: dict[str, object], inverse: bool, device, poisoned) -> None:
    """In one launch each way, its inverse's implicit gradient included."""
    if rehearsed(device) and shape[0] > 17:
        pytest.skip("the interpreter takes minutes for this batch")
    values, seen = autoregressive_flows.tensors(*shape, **made)
    options = {name: value for name, value in made.items() if name != "ties"} | {"activation": "tanh"}
    results = []
    with count_launches() as launches:
        for module, dtype in ((ops, torch.float32), (reference, torch.float64)):
            op = flow_of(getattr(module, NAMES[inverse]), seen.to(device), **options)
            given = [None if t is None else t.detach().to(device, dtype).requires_grad_() for t in values]
            results.append(flow_values.run_op(op, given))
    assert launches.count("autoregressive_kernel") == 1 and "autoregressive_backward_kernel" in launches
    for i, (ours, exact) in enumerate(zip(*results, strict=True)):
        # A number that rounding puts on the other side of a knot has another gradient.
        assert error(ours, exact) < (1e-2 if i > 1 and "transform" in made else 1e-4), i


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_autoregressive_flows_in_low_precision(precision: str, device) -> None:
    if rehearsed(device):
        pytest.skip("the interpreter computes tf32 exactly, and no bfloat16")
    values, seen = autoregressive_flows.tensors(1000, 2, 10, 16, (50, 50), context_layer=True)
    torch.set_float32_matmul_precision(precision)
    for name in NAMES.values():
        results = []
        for module, dtype in ((ops, torch.float32), (reference, torch.float64)):
            op = flow_of(getattr(module, name), seen.to(device), activation="tanh", context_layer=True)
            given = [t.detach().to(device, dtype).requires_grad_() for t in values]
            results.append(flow_values.run_op(op, given))
        for ours, exact in zip(*results, strict=True):
            assert error(ours, exact) < (1e-2 if precision == "high" else 5e-2)


@pytest.mark.parametrize(("log_scale", "add_first", "inverse", "layout", "low"), COUPLINGS)
def test_the_elementwise_coupling(
    log_scale: str, add_first: bool, inverse: bool, layout, low: torch.dtype, device, poisoned
) -> None:
    """With u and t as chunks of one network's output."""
    shape, order = layout
    options = {"log_scale": log_scale, "add_first": add_first, "inverse": inverse}
    g = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=g).to(device)
    raw = torch.randn((shape[0], 2 * shape[1], *shape[2:]), generator=g).to(device)
    results = []
    for op, state, network in ((ops, torch.float32, low), (reference, torch.float64, torch.float64)):
        # The same numbers for both: those that the low precision holds.
        leaves = [v.to(state, memory_format=order), raw.to(low).to(network).to(memory_format=order)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        w, logdet = op.affine_coupling(leaves[0], *leaves[1].chunk(2, 1), **options)
        weights = torch.linspace(-1, 1, len(v), device=device)
        grads = torch.autograd.grad(w.sin().sum() + (weights * logdet).sum(), leaves)
        results.append([t.detach() for t in (w, logdet, *grads)])
    assert results[0][0].is_contiguous(memory_format=order)
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) < (5e-3 if ours.dtype == torch.bfloat16 else 1e-5)


def running_sums(x: torch.Tensor, dim: int) -> torch.Tensor:
    """cumsum in x's own precision."""
    sums = [x.select(dim, 0)]
    for i in range(1, x.shape[dim]):
        sums.append(sums[-1] + x.select(dim, i))
    return torch.stack(sums, dim)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [2, 8, 32])
@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_splines(parametrization: str, tails: str, bins: int, inverse: bool, device, poisoned, monkeypatch) -> None:
    """Several rows in a program, and several programs in a row; an element's error is at most three times plain PyTorch's.

    The median, because one element in a steep bin next to a flat one has more error than all others together.
    """
    if rehearsed(device):  # a processor's cumsum adds up float32 in float64: its errors with 32 bins are half as large
        monkeypatch.setattr(torch.Tensor, "cumsum", running_sums)
    options = Spline(bins, tails=tails, parametrization=parametrization)
    for rows, columns in ((9, 6), (3, 150)) if rehearsed(device) else ((1001, 6), (300, 150)):
        g = torch.Generator().manual_seed(0)
        values = 3 * torch.randn(rows, columns, generator=g), torch.randn(rows, columns, options.columns, generator=g)
        results = []
        for op, dtype in ((ops, torch.float32), (reference, torch.float32), (reference, torch.float64)):
            leaves = [t.to(device, dtype).requires_grad_() for t in values]
            if op is ops:
                y, logdet = ops.spline(*leaves, options, inverse=inverse, event_dims=1)
            else:
                y, log_slope = reference.spline(*leaves, options, inverse=inverse)
                logdet = log_slope.sum(1)
            weights = torch.linspace(-1, 1, rows, device=device)
            grads = torch.autograd.grad(y.sin().sum() + (weights * logdet).sum(), leaves)
            results.append([t.detach() for t in (y, logdet, *grads)])
        for name, ours, plain, exact in zip(("y", "logdet", "∂x", "∂parameters"), *results, strict=True):
            assert error(ours, exact) < (5e-3 if name.startswith("∂") else 1e-4), name
            mine, theirs = ((t - exact).abs().median() for t in (ours, plain))
            assert mine <= 3 * theirs + 1e-7 or name == "logdet", name  # a sum of few rows has no median


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in rehearsals
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_bad_and_alone(bad: float, device) -> None:
    values = tensors(device, 40, 2, 9, 0, (33, 18))
    values[0][3, 1] = bad
    out, logdet, grad_x, *_ = run(ops.coupling_flow, values, torch.float32)
    for t in (out, logdet, grad_x):
        broken = ~t.isfinite().view(40, -1)
        assert broken[3].any() and broken.sum() == broken[3].sum()


@pytest.mark.parametrize("reversible", [False, True])
def test_results_repeat_exactly(reversible: bool, device) -> None:
    values = tensors(device, 17 if rehearsed(device) else 5000, 2, 20, 0, (64, 64))
    first = run(ops.coupling_flow, values, torch.float32, reversible=reversible)
    for a, b in zip(first, run(ops.coupling_flow, values, torch.float32, reversible=reversible), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_launch_in_each_direction(direction: str, device) -> None:
    values = tensors(device, 17, 5, 8, 0, (16, 16))
    with use_backend("triton"), count_launches() as launches:
        run(getattr(ops, DIRECTIONS[direction]), values, torch.float32)
    # Packing comes before either, sums over rows behind the backward, where no CUDA kernel makes them (test_row_products.py).
    assert launches == ["pack_kernel", "flow_kernel", "pack_kernel", "flow_backward_kernel", "sums_kernel"]
