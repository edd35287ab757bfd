"""Flows of splines in the whole-flow kernels, interpreted, against the float64 reference."""

import itertools

import pytest
import torch
from flow_values import DIRECTIONS, compare, error, run, tensors

from glf_fast import ops, reference
from glf_fast.kernels.launch import count_launches
from glf_fast.kernels.launch_table import Launch, keys
from glf_fast.kernels.spline import constants
from glf_fast.reference import TAILS, Spline

pytestmark = pytest.mark.usefixtures("interpreted")

# (rows, steps, D, context, hidden widths) and spline: every parametrization and every tail; halves of one column, odd D, two
# programs, 18 columns in two groups, more slopes than the bins' power of two, one to three layers.
FLOWS = [
    ("forward", False, (3, 2, 2, 0, (9,)), Spline(2, parametrization="nflows")),
    ("inverse", True, (3, 2, 2, 0, (9,)), Spline(2, parametrization="nflows")),
    ("forward", True, (19, 1, 5, 3, (18, 3)), Spline(10, -3.0, 4.0, "none", "madnis")),
    ("inverse", False, (19, 1, 5, 3, (18, 3)), Spline(10, -3.0, 4.0, "none", "madnis")),
    ("forward", False, (4, 1, 7, 2, (8, 17, 6)), Spline(5, -2.0, 2.0, "circular", "zuko")),
    ("inverse", True, (4, 1, 7, 2, (8, 17, 6)), Spline(5, -2.0, 2.0, "circular", "zuko")),
    ("forward", True, (3, 1, 37, 0, (16,)), Spline(8, tails="none", parametrization="nflows", scale=0.7)),
    ("inverse", False, (3, 1, 37, 0, (16,)), Spline(8, tails="none", parametrization="nflows", scale=0.7)),
]


@pytest.mark.parametrize(("direction", "reversible", "shape", "spline"), FLOWS)
def test_values_and_gradients(direction: str, reversible: bool, shape, spline: Spline) -> None:
    values = tensors(*shape, coupling="spline", spline=spline)
    with count_launches() as launches:
        compare(values, direction, 1e-10, reversible, coupling="spline", spline=spline, activation="silu")
    assert launches == ["pack_kernel", "flow_kernel", "pack_kernel", "flow_backward_kernel", "sums_kernel"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_groups_of_other_launches_in_float32(direction: str, monkeypatch) -> None:
    """Groups of two columns, for 32 rows of which 19 exist."""
    from glf_fast.kernels import launch_table

    how = Launch(32, 32, 16, staged=True, num_warps=1, num_stages=1)
    assert how.group == 2
    monkeypatch.setattr(launch_table, "INTERPRETED", how)
    compare(tensors(19, 1, 6, 0, (20,), torch.float32, coupling="spline"), direction, 1e-4, coupling="spline")


def test_density_and_results_repeat() -> None:
    *given, context, w, v, b, d = tensors(3, 1, 4, 0, (8,), coupling="spline")
    leaves = [*given, torch.ones((), dtype=torch.float64, requires_grad=True), w, v, b, d]
    assert context is None
    results = []
    for module in (ops, ops, reference):
        found = module.coupling_flow_log_prob(*leaves[:4], [w, v], [b, d], coupling="spline")
        results.append([found, *torch.autograd.grad(found.sin().sum(), leaves)])
    for first, second, exact in zip(*results, strict=True):
        assert torch.equal(first, second) and error(first, exact) < 1e-12


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # NumPy's, from the interpreter
def test_a_bad_row_is_the_reference_s_and_harms_no_other() -> None:
    values = tensors(20, 1, 5, 0, (9,), torch.float32, coupling="spline")
    with torch.no_grad():
        values[0][3, 1] = float("nan")
    ours, exact = (run(module.coupling_flow, values, coupling="spline")[:3] for module in (ops, reference))
    for mine, truth in zip(ours, exact, strict=True):
        assert torch.equal(mine.isnan(), truth.isnan()) and not mine[torch.arange(20) != 3].isnan().any()


# Too many columns, too wide, too many layers, no hidden layer, too many slopes, too many rows for their size.
REFUSED = [
    (3, 66, (8,), 8, "2 to 64 columns"),
    (3, 6, (260,), 8, "up to 256"),
    (3, 6, (8,) * 5, 8, "1 to 4 hidden layers"),
    (3, 6, (), 8, "1 to 4 hidden layers"),
    (3, 6, (8,), 17, "more than 16"),
    (4097, 33, (8,), 8, "more than 4096 rows"),
]


@pytest.mark.parametrize(("rows", "dim", "hidden", "bins", "why"), REFUSED)
def test_others_go_layer_by_layer(rows: int, dim: int, hidden: tuple[int, ...], bins: int, why: str) -> None:
    from glf_fast.ops.coupling_flow import _options, triton
    from glf_fast.ops.coupling_flow.call import Call, Maps

    spline = Spline(bins)
    x, A, c, _, *layers = tensors(rows, 1, dim, 0, hidden, torch.float32, coupling="spline", spline=spline)
    half = len(layers) // 2
    options = _options("spline", "mlp", "relu", None, "tanh", None, False, spline, False, False, False, False)
    assert why in triton.refuses(Call(x, None, Maps(A, c, None), layers[:half], layers[half:], options))
    if rows < 10:
        with count_launches() as launches:
            ops.coupling_flow(x, A, c, layers[:half], layers[half:], coupling="spline", spline=spline)
        assert launches == ["spline_kernel"]


def test_flows_that_are_not_refused_have_a_launch(monkeypatch) -> None:
    from glf_fast.kernels import launch_table
    from glf_fast.ops.coupling_flow import triton

    found = set()
    for arch in (80, 90, 100):
        monkeypatch.setattr(launch_table, "architecture", lambda index, arch=arch: str(arch))
        for dim, width, layers, batch, bins, tails in itertools.product(
            (2, 32, 33, 64), (1, 64, 65, 256), (1, 4), (1, 4096, 4097, 10**6), (2, 8, 9, 16), TAILS
        ):
            spline, hidden = Spline(bins, tails=tails), (width,) * layers
            if triton._refuses_splines(dim, hidden, batch, spline):
                continue
            given = constants(spline.prepared().numbers())
            for backward, precision in itertools.product((False, True), launch_table.PRECISIONS):
                how = launch_table.launch_for(backward, dim, hidden, precision, batch, torch.device("cuda"), given)
                assert how.staged and how.rows * how.group >= 32 * how.num_warps
                found.add((arch, launch_table.key_for(backward, dim, hidden, precision, batch, given)))
    assert {key for _, key in found} == {key for key in keys() if "splines" in key}
