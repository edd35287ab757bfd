"""Weight gradients in one launch on the GPU: float64, Triton's own products, graphs, repetition, either compiler."""

import pytest
import torch
from exact_flows import DIRECTIONS, error, run, tensors
from torch import Tensor

from glf_fast import backends, ops, use_backend
from glf_fast.kernels.launch import count_launches
from glf_fast.ops.row_products import cupy as cupy_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends()["cuda"].startswith("ready"), reason=f"backend cuda: {backends()['cuda']}"),
]
FLOAT, TF32, BF16 = range(3)
KINDS = [(FLOAT, 3, 5), (TF32, 65, 64), (BF16, 30, 66), (FLOAT, 256, 130), (BF16, 512, 256), (FLOAT, 0, 1)]


def layers(rows: int) -> list[list]:
    """x, g, operands, products, sums: slices of wider rows, and results that are NaN."""
    torch.manual_seed(rows)
    made = []
    for operands, n_in, n_out in KINDS:
        dtype = torch.bfloat16 if operands == BF16 else torch.float32
        x = torch.randn(3, rows, n_in + 6, device="cuda").to(dtype)[:2, :, 2 : 2 + n_in]
        g = torch.randn(2, rows, 2 * n_out, device="cuda").to(dtype)[..., :n_out]
        nan = lambda *shape: torch.full(shape, torch.nan, device="cuda")  # noqa: E731
        made.append((x, g, operands, nan(2, n_in, n_out), nan(2, n_out)))
    return [list(values) for values in zip(*made, strict=True)]


@pytest.mark.parametrize(("rows", "parts"), [(0, 1), (1, 1), (100, 1), (5000, 3), (100_000, 40)])
def test_layers_of_every_kind_in_one_launch(rows: int, parts: int) -> None:
    values = layers(rows)
    op = torch.ops.glf_fast.row_products.default
    op(*values, False, parts)
    once = [t.clone() for t in (*values[3], *values[4])]
    for x, g, operands, product, total in zip(*values, strict=True):
        limit = 1e-3 if operands == TF32 else 2e-6
        size = x.abs().double().mT @ g.abs().double()
        assert ((product.double() - x.double().mT @ g.double()).abs() <= limit * size).all()
        assert ((total.double() - g.double().sum(1)).abs() <= 2e-6 * g.abs().double().sum(1)).all()
    op(*values, False, parts)
    assert all(map(torch.equal, once, (*values[3], *values[4])))
    op(*values, True, parts)
    for t, before in zip((*values[3], *values[4]), once, strict=True):
        assert torch.equal(t, 2 * before)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")  # that nvcc's is overridden
def test_compiled_by_nvrtc() -> None:
    """Where nvcc compiled the kernels these replace its own; where it did not, they are what the other tests run."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    with torch.library._scoped_library("glf_fast", "IMPL") as library:
        if not backends()["cuda"].endswith("CuPy"):
            cupy_products.register(library, override=True)
        test_layers_of_every_kind_in_one_launch(5000, 3)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [17, 5000])
def test_a_flows_gradients_are_those_of_its_own_products(batch: int, direction: str, precision: str, device) -> None:
    values = tensors(device, batch, 4, 20, 3, (64, 50), direction)
    torch.set_float32_matmul_precision(precision)
    op = getattr(ops, DIRECTIONS[direction])
    with count_launches() as launches:
        found = run(op, values, torch.float32)
    assert "flow_backward_kernel" in launches and "sums_kernel" not in launches
    with use_backend("triton"), count_launches() as launches:
        own = run(op, values, torch.float32)
    assert "sums_kernel" in launches
    for mine, other in zip(found, own, strict=True):
        assert error(mine, other) < {"highest": 1e-5, "high": 2e-3, "medium": 2e-3}[precision]


def test_a_graph_replays_the_same() -> None:
    values = layers(5000)
    results: list[Tensor] = [*values[3], *values[4]]
    torch.ops.glf_fast.row_products.default(*values, False, 3)  # a kernel is compiled at its first use
    want = [t.clone() for t in results]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.glf_fast.row_products.default(*values, False, 3)
    for t in results:
        t.fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, want, results))
