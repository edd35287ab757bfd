"""Weight gradients through CuPy without a GPU: NVRTC compiles the kernels, and the launches run on the host."""

import itertools
from pathlib import Path

import forked
import pytest
import torch
from host_launches import launcher
from nvrtc import check_that_nvrtc_compiles
from torch import Tensor

from glf_fast.ops.row_products import cupy as cupy_products

FLOAT, TF32, BF16 = range(3)
# Relative to sums of magnitudes: two factors rounded to tf32, or sums of float32 numbers.
LIMITS = {FLOAT: 1e-6, TF32: 1e-3, BF16: 1e-6}


@pytest.fixture(autouse=True)
def on_host(host_kernels, monkeypatch) -> list[tuple[int, int]]:
    """Launches are calls of the host's library; the threads and the shared memory of each."""
    seen: list[tuple[int, int]] = []
    run = launcher(host_kernels, lambda threads, shared: seen.append((threads, shared)))
    monkeypatch.setattr(cupy_products, "launch", run)
    return seen


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def exact(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return x.double().mT @ g.double(), g.double().sum(1)


def empty(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    nan = lambda *shape: torch.full(shape, torch.nan)  # noqa: E731
    return nan(len(x), x.shape[2], g.shape[2]), nan(len(x), g.shape[2])


def check(x: Tensor, g: Tensor, operands: int, product: Tensor, total: Tensor, times: int = 1) -> None:
    size, total_size = exact(x.abs(), g.abs())
    for found, truth, scale in zip((product, total), exact(x, g), (size, total_size), strict=True):
        limit = LIMITS[operands] if found is product else LIMITS[FLOAT]
        assert ((found.double() - times * truth).abs() <= times * limit * scale).all()


@pytest.mark.parametrize(("rows", "parts", "launches"), [(0, 1, 1), (1, 1, 1), (100, 1, 1), (150, 3, 2), (64, 9, 2)])
def test_layers_of_every_kind_in_one_launch(on_host, rows: int, parts: int, launches: int) -> None:
    """Slices of wider rows, widths on either side of a tile's, and sums alone. Once more, and onto what is there."""
    kinds = [(FLOAT, 3, 5), (TF32, 65, 64), (BF16, 30, 66), (FLOAT, 0, 1)]
    x, g, products, sums = [], [], [], []
    for operands, n_in, n_out in kinds:
        dtype = torch.bfloat16 if operands == BF16 else torch.float32
        x.append(normal(3, rows, n_in + 6).to(dtype)[:2, :, 2 : 2 + n_in])
        g.append(normal(2, rows, 2 * n_out).to(dtype)[..., :n_out])
        product, total = empty(x[-1], g[-1])
        products.append(product)
        sums.append(total)
    operands = [kind for kind, _, _ in kinds]
    cupy_products.row_products(x, g, operands, products, sums, False, parts)
    assert len(on_host) == launches and on_host[0] == (256, cupy_products.SHARED)
    once = [t.clone() for t in (*products, *sums)]
    for values in zip(x, g, operands, products, sums, strict=True):
        check(*values)
    cupy_products.row_products(x, g, operands, products, sums, False, parts)
    assert all(map(torch.equal, once, (*products, *sums)))
    cupy_products.row_products(x, g, operands, products, sums, True, parts)
    for values in zip(x, g, operands, products, sums, strict=True):
        check(*values, times=2)


def test_a_sum_that_nobody_wants_is_not_made() -> None:
    x, g = normal(2, 40, 7), normal(2, 40, 9)
    product, _ = empty(x, g)
    cupy_products.row_products([x], [g], [FLOAT], [product], [torch.empty(0)], False, 1)
    torch.testing.assert_close(product.double(), exact(x, g)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [0, 1])
def test_what_is_every_steps_or_every_rows(stride: int) -> None:
    """Expanded tensors: one step's rows for all steps, as log|det A|'s gradient is, and one row for all rows."""
    x = normal(3, 40, 4)
    g = normal(1, 40, 5).expand(3, 40, 5) if stride == 0 else normal(3, 1, 5).expand(3, 40, 5)
    product, total = empty(x, g)
    cupy_products.row_products([x], [g], [FLOAT], [product], [total], False, 1)
    check(x, g, FLOAT, product, total)


def test_what_does_not_fit_is_refused(on_host) -> None:
    x, g = normal(2, 8, 4), normal(2, 8, 6)
    product, total = empty(x, g)
    good = {"x": x, "g": g, "operands": FLOAT, "products": product, "sums": total}
    half = {"x": x.bfloat16(), "g": g.bfloat16(), "operands": BF16}
    bad = [
        ({"x": x[:1]}, "factors"),
        ({"x": x[:, :7]}, "factors"),
        ({"g": g[0]}, "factors"),
        ({"x": x.bfloat16()}, "bfloat16"),
        ({"operands": BF16}, "float32"),
        ({"x": x.to("meta")}, "meta"),
        ({"x": x.mT.contiguous().mT}, "neighbours"),
        (half | {"x": normal(2, 8, 5).bfloat16()[..., 1:]}, "four bytes"),
        ({"products": product.mT}, "results"),
        ({"products": product.double()}, "results"),
        ({"sums": total[:, :5]}, "results"),
    ]
    for change, message in bad:
        with pytest.raises(RuntimeError, match=message):
            cupy_products.row_products(*([value] for value in (good | change).values()), False, 1)
    values = [[value] for value in good.values()]
    with pytest.raises(RuntimeError, match="lists of 1 to 8"):
        cupy_products.row_products(*([] for _ in values), False, 1)
    with pytest.raises(RuntimeError, match="lists of 1 to 8"):
        cupy_products.row_products(*(value * 9 for value in values), False, 1)
    with pytest.raises(RuntimeError, match="of one length"):
        cupy_products.row_products(*values[:-1], [], False, 1)
    with pytest.raises(RuntimeError, match="one part"):
        cupy_products.row_products(*values, False, 0)
    with pytest.raises(RuntimeError, match="operands"):
        cupy_products.row_products(*values[:2], [3], *values[3:], False, 1)
    assert not on_host


def test_sizes_are_those_of_the_headers() -> None:
    """The structs' sizes are compared at every launch (host_kernels.cpp)."""
    text = (Path(__file__).parents[2] / "csrc" / "cuda" / "row_product.cuh").read_text()
    for name, value in {
        "most_products": cupy_products.MOST,
        "result_side": cupy_products.SIDE,
        "stage_rows": cupy_products.STAGE_ROWS,
        "row_products_threads": cupy_products.THREADS,
        "added_numbers": cupy_products.ADDED,
    }.items():
        assert f"{name} = {value}" in text, name
    line, stages = cupy_products.SIDE + 8, 4
    assert f"stages = {stages};" in text and stages * 2 * cupy_products.STAGE_ROWS * line * 4 == cupy_products.SHARED


def test_nvrtc_compiles_the_kernels() -> None:
    check_that_nvrtc_compiles(cupy_products.SOURCE, cupy_products.KERNELS)


def test_blocks_of_the_flows_that_are_shipped() -> None:
    """Rows in parts where results are few, so that two blocks of each of 132 multiprocessors have work."""
    from glf_fast.kernels.weight_gradients import parts_of

    for (tiles, rows), parts in {
        (8, 256): 1, (8, 1024): 2, (8, 65536): 33, (264, 65536): 1, (1, 1 << 20): 264, (0, 512): 1, (5, 0): 1,
    }.items():  # fmt: skip
        assert parts_of(rows, tiles, 132) == parts
    for tiles, rows in itertools.product((1, 7, 100, 263), (512, 8192, 100_000)):
        assert tiles * parts_of(rows, tiles, 132) <= 2 * 132


def test_where_the_operation_is_ready() -> None:
    """On a GPU with such matrix units, in float32, unless another backend was asked for."""
    pytest.importorskip("cupy", reason="needs CuPy, which has no wheel for this machine")
    code = """
import torch
torch.version.cuda = torch.version.cuda or "13.0"  # as a torch with CUDA would say
import glf_fast
from torch._subclasses import FakeTensorMode
from glf_fast.ops import row_products
from glf_fast.ops.linear import cupy
assert torch._C._dispatch_has_kernel_for_dispatch_key("glf_fast::row_products", "CUDA")
capability = (8, 0)
torch.cuda.get_device_capability = lambda device: capability
cupy.trouble = lambda device: ""
assert not row_products.ready(torch.empty(2))
with FakeTensorMode():
    x = torch.empty(2, 3, device="cuda")
    assert row_products.ready(x) and not row_products.ready(x.double())
    with glf_fast.use_backend("triton"):
        assert not row_products.ready(x)
    with glf_fast.use_backend("cuda"):
        assert row_products.ready(x)
    capability = (7, 5)
    assert not row_products.ready(x)
"""
    done = forked.fresh(code)
    assert done.returncode == 0, done.stderr
