"""CUDA through CuPy without a GPU: NVRTC compiles the kernels, and the launches run on the host, argument by argument."""

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import forked
import linear_zoo
import pytest
import torch
from host_launches import launcher
from nvrtc import check_that_nvrtc_compiles

from glf_fast import reference
from glf_fast.ops.backends import _cupy_missing
from glf_fast.ops.linear import cupy as cupy_linear

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(params=[227 << 10, 4 << 10], ids=["227 KiB", "4 KiB"])
def on_host(host_kernels, monkeypatch, request):
    """Launches are calls of the host's library; blocks have this much shared memory. Results are poisoned with NaN."""

    def blocks(threads: int, shared: int) -> None:
        assert threads in (128, 256) and shared <= max(request.param, 48 << 10)  # what no kernel needs to ask for

    monkeypatch.setattr(cupy_linear, "launch", launcher(host_kernels, blocks))
    monkeypatch.setattr(cupy_linear, "most_shared", lambda device: request.param)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 4, 7, 8, 16, 17, 32, 33, 48, 64, 65, 97])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_dense_matrices(on_host, count: int, dim: int, dtype: torch.dtype) -> None:
    A = torch.randn(count, dim, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    sign, logabsdet, inverse, info = cupy_linear.slogdet_inverse(A.to(dtype))
    exact = torch.linalg.slogdet(A.to(dtype).double())
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(logabsdet.double(), exact.logabsdet, **tolerance)
    assert torch.equal(sign.double(), exact.sign) and not info.any()
    eye = torch.eye(dim, dtype=torch.float64).expand(count, dim, dim)
    torch.testing.assert_close(A.to(dtype).double() @ inverse.double(), eye, **tolerance)


@pytest.mark.parametrize("actnorm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 16, 20, 33, 65])
def test_plu(on_host, dim: int, dtype: torch.dtype, actnorm: bool) -> None:
    g = torch.Generator().manual_seed(dim)
    normal = lambda *shape: torch.randn(3, *shape, generator=g, dtype=torch.float64)  # noqa: E731
    order = torch.rand(3, dim, generator=g).argsort(-1)
    floats = [normal(dim, dim) / dim**0.5, normal(dim, dim) / dim**0.5, 0.3 * normal(dim), normal(dim).sign()]
    floats += [0.3 * normal(dim), 0.3 * normal(dim)] if actnorm else []
    exact = [t.requires_grad_() for t in floats]
    want = reference.plu_assemble(order, *exact)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in want]
    found = [t.detach().to(dtype).contiguous() for t in floats] + [None] * (2 if not actnorm else 0)
    got = cupy_linear.plu_assemble(order, *found, True)
    tolerance = {"rtol": 2e-3, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs.detach(), **tolerance)
    assert cupy_linear.plu_assemble(order, *found, False)[1].numel() == 0
    backward = cupy_linear.plu_assemble_backward(order, *found, *got[:2], *(w.to(dtype) for w in weights))
    leaves = exact[:3] + exact[4:]
    truth = torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, want, strict=True)), leaves)
    for mine, theirs in zip(backward, truth, strict=True):
        torch.testing.assert_close(mine.double(), theirs, **tolerance)
    for given in range(4):  # of A, A⁻¹, c, log|det A|
        only = [w.to(dtype) if i == given else None for i, w in enumerate(weights)]
        alone = cupy_linear.plu_assemble_backward(order, *found, *got[:2], *only)
        loss = (weights[given] * reference.plu_assemble(order, *exact)[given]).sum()
        truth = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        for mine, theirs in zip(alone, truth, strict=True):
            zero = torch.zeros_like(mine.double())
            torch.testing.assert_close(mine.double(), zero if theirs is None else theirs, **tolerance)


def test_the_blocks_of_a_launch(monkeypatch) -> None:
    """Small matrices are inverted by warps, many a block; a layer is several blocks' work."""
    seen = []
    monkeypatch.setattr(cupy_linear, "launch", lambda name, _, grid, block, *rest: seen.append((name, grid, block)))
    monkeypatch.setattr(cupy_linear, "most_shared", lambda device: 227 << 10)
    for dim, dtype in (
        (4, torch.float32),
        (20, torch.float64),
        (64, torch.float32),
        (65, torch.float32),
        (193, torch.float32),
    ):
        cupy_linear.slogdet_inverse(torch.zeros(100, dim, dim, dtype=dtype))
    vector, matrix = torch.zeros(8, 64), torch.zeros(8, 64, 64)
    order = torch.arange(64).repeat(8, 1)
    cupy_linear.plu_assemble(order, matrix, matrix, vector, vector, None, None, True)
    for grad_A_inv in (None, matrix):
        cupy_linear.plu_assemble_backward(
            order, matrix, matrix, vector, vector, vector, vector, matrix, matrix, matrix, grad_A_inv, vector, None
        )
    assert [(name.removeprefix("glf::device::"), *sizes) for name, *sizes in seen] == [
        ("slogdet_inverse_warp_kernel<4, float>", 4, 128),
        ("slogdet_inverse_warp_kernel<24, double>", 25, 128),
        ("slogdet_inverse_warp_kernel<64, float>", 25, 128),
        ("slogdet_inverse_tile_kernel<6, float>", 100, 256),
        ("slogdet_inverse_kernel<float>", 100, 256),
        ("plu_assemble_kernel<float>", 16, 256),
        ("plu_assemble_backward_kernel<float>", 256, 256),
        ("plu_inverse_gradient_kernel<float>", 32, 256),
        ("plu_assemble_backward_kernel<float>", 256, 256),
    ]


def test_indices_out_of_range_stay_within_the_layer(on_host) -> None:
    dim = 20
    order = torch.arange(dim).repeat(3, 1)
    order[1, [0, 3, 4]] = torch.tensor([1 << 40, -5, dim])
    matrix, vector = torch.randn(3, dim, dim), torch.randn(3, dim)
    got = cupy_linear.plu_assemble(order, matrix, matrix, vector, vector, vector, vector, True)
    want = cupy_linear.plu_assemble(order[[0, 0, 2]], matrix, matrix, vector, vector, vector, vector, True)
    cupy_linear.plu_assemble_backward(
        order, matrix, matrix, vector, vector, vector, vector, *got[:2], matrix, matrix, vector, None
    )
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])


def test_tensors_of_other_devices_are_refused() -> None:
    vector, matrix = torch.zeros(1, 2), torch.zeros(1, 2, 2)
    with pytest.raises(RuntimeError, match="a kernel on cpu got a tensor on meta"):
        cupy_linear.plu_assemble(
            torch.zeros(1, 2, dtype=torch.int64, device="meta"), matrix, matrix, vector, vector, None, None, True
        )


def test_what_does_not_fit_is_refused(on_host) -> None:
    with pytest.raises(RuntimeError, match="matrices"):
        cupy_linear.slogdet_inverse(torch.zeros(3, 2, 4))
    with pytest.raises(RuntimeError, match="contiguous"):
        cupy_linear.slogdet_inverse(torch.zeros(3, 4, 4).mT)
    with pytest.raises(RuntimeError, match="int64"):
        eye = torch.zeros(1, 2, 2)
        cupy_linear.plu_assemble(torch.zeros(1, 2, dtype=torch.int32), eye, eye, eye[0], eye[0], None, None, True)


def test_replacing_compiled_kernels_does_not_warn() -> None:
    code = """
import warnings, torch
from glf_fast.ops.linear import cupy as cupy_linear
warnings.simplefilter("error")
with torch.library._scoped_library("glf_fast", "IMPL") as one, torch.library._scoped_library("glf_fast", "IMPL") as two:
    cupy_linear.register(one, override=True)
    cupy_linear.register(two, override=True)
"""
    done = forked.fresh(code)  # torch warns once a process
    assert done.returncode == 0, done.stderr


def test_the_backend_chooses_cupy_where_nothing_is_compiled() -> None:
    pytest.importorskip("cupy", reason="needs CuPy, which has no wheel for this machine")
    code = """
import sys, torch
torch.version.cuda = torch.version.cuda or "13.0"  # as a torch with CUDA would say
import glf_fast
from torch._subclasses import FakeTensorMode
assert glf_fast.backends()["cuda"].endswith("compiled at their first use by CuPy"), glf_fast.backends()
assert "cupy" not in sys.modules
assert torch._C._dispatch_has_kernel_for_dispatch_key("glf_fast::plu_assemble_backward", "CUDA")
with FakeTensorMode(allow_non_fake_inputs=True):
    sign, _, inverse, _ = torch.ops.glf_fast.slogdet_inverse(torch.empty(5, 3, 3, device="cuda"))
    from glf_fast.ops.backends import kernels_for
    from glf_fast.ops.linear import cupy as cupy_linear, dense
    torch.cuda.get_device_capability = lambda device: (7, 5)
    cupy_linear.trouble = lambda device: ""
    small, large = (torch.empty(2, n, n, device="cuda") for n in (192, 193))
    assert kernels_for(small, small, dense)
    assert not kernels_for(large, large, dense)  # torch.linalg's
assert inverse.shape == (5, 3, 3) and sign.device.type == "cuda"
"""
    done = forked.fresh(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "version", "why"),
    [
        ("cupy-cuda13x", "13.6.0", "cupy-cuda13x 13.6.0 is too old: 14 is the first that works"),
        ("cupy", "13.0.0rc1", "cupy 13.0.0rc1 is too old"),
        ("cupy-cuda12x", "14.2.0", "the CuPy that is installed is not for CUDA 13, as torch is"),
        ("cupy-cuda13x", "14.2.0", ""),
        ("cupy", "14.0.0", ""),
        ("numpy-like", "1.0", "is not installed"),
    ],
)
def test_a_cupy_that_cannot_serve_is_seen_without_importing_it(monkeypatch, name: str, version: str, why: str) -> None:
    def installed(asked: str) -> str:
        if asked == name:
            return version
        raise importlib.metadata.PackageNotFoundError(asked)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    found = object() if name.startswith("cupy") else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: found if asked == "cupy" else None)
    found = _cupy_missing("13")
    assert why in found and bool(found) == bool(why)


def test_a_gpu_that_nothing_runs_on_takes_the_reference_with_a_warning(tmp_path: Path) -> None:
    """A CuPy that fails when it is used, then a GPU that is older than every architecture of ours."""
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text("raise ImportError('libcuda.so.1: cannot open\\nmore')\n")
    code = """
import importlib.metadata, sys, torch, warnings
torch.version.cuda = "13.0"
true_version = importlib.metadata.version
importlib.metadata.version = lambda name: "14.2.0" if name == "cupy-cuda13x" else true_version(name)
capability = (9, 0)
torch.cuda.get_device_capability = lambda device: capability
from torch._subclasses import FakeTensorMode
import glf_fast
backends = sys.modules["glf_fast.ops.backends"]
assert backends.backends()["cuda"].startswith("ready"), backends.backends()
for capability, why in (
    ((9, 0), "CuPy does not compile it: ImportError: libcuda.so.1: cannot open)"),
    ((7, 0), "this GPU's compute capability is below 7.5)"),
):
    backends._misfit.cache_clear(), backends._warned.clear()
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.empty(2, 3, 3, device="cuda")
        assert not any(backends.usable(backends.CUDA, x) for _ in range(2))
    (warning,) = caught
    assert f"backend 'cuda' is missing ({why}" in str(warning.message), warning.message
    assert warning.filename == "<string>", warning.filename
"""
    done = forked.fresh(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{code}")
    assert done.returncode == 0, done.stderr


# The first of each template; the others differ in a size or a type.
TEMPLATES = [*{name.split("<")[0]: name for name in reversed(cupy_linear.KERNELS)}.values()]


@pytest.mark.parametrize(
    "names",
    [TEMPLATES, pytest.param(cupy_linear.KERNELS, marks=pytest.mark.long)],
    ids=["one of each template", "all"],
)
def test_nvrtc_compiles_the_kernels(names: Sequence[str]) -> None:
    assert len(TEMPLATES) == 6 and len(cupy_linear.KERNELS) == 2 * 4 + (7 + 5) + 3 + 3
    check_that_nvrtc_compiles(cupy_linear.SOURCE, names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dim", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25, 31, 32, 33, 48, 49, 63, 64, 65, 80, 96, 97, 128, 129, 192, 193]
)
def test_the_zoo_by_scaled_residuals(on_host, dim: int, dtype: torch.dtype) -> None:
    named = linear_zoo.zoo(dim, dtype)
    del named["growth"]
    matrices = torch.stack([*named.values()])
    sign, logabsdet, inverse, info = cupy_linear.slogdet_inverse(matrices)
    exact = torch.linalg.slogdet(matrices.double())
    assert not info.any()
    for i, (name, matrix) in enumerate(named.items()):
        rounding = dim * torch.finfo(dtype).eps * float(torch.linalg.cond(matrix.double()))
        if rounding < 1e-2:
            assert linear_zoo.inverse_residual(matrix, inverse[i]) < linear_zoo.LIMIT, name
            assert linear_zoo.inverse_residual(matrix.mT, inverse[i].mT) < linear_zoo.LIMIT, name
            # What ops.slogdet_inverse promises: LAPACK may be nearer, this is within what the matrix's condition allows.
            truth = torch.linalg.inv(matrix.double())
            assert torch.linalg.norm(inverse[i].double() - truth) <= rounding * torch.linalg.norm(truth), name
            assert sign[i] == exact.sign[i], name
            tolerance = 10 * rounding + abs(exact.logabsdet[i]) * 1e-6
            assert abs(logabsdet[i].double() - exact.logabsdet[i]) <= tolerance, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 5, 20, 32, 33, 64, 70, 128, 130])
def test_singular_matrices_nan_and_equal_sizes(on_host, dim: int, dtype: torch.dtype) -> None:
    A = torch.eye(dim, dtype=dtype).repeat(6, 1, 1)
    A[1, -1, -1] = 0
    A[2] = 0
    A[3, 0, dim // 2] = A[3, dim // 2, 0] = float("nan")
    A[4] = A[4].flip(0)
    A[5] *= 1e-30
    sign, logabsdet, inverse, info = cupy_linear.slogdet_inverse(A)
    swaps = dim // 2
    assert sign[[0, 1, 2, 4, 5]].tolist() == [1, 0, 0, (-1) ** swaps, 1]
    assert logabsdet[[0, 1, 2, 4]].tolist() == [0, -torch.inf, -torch.inf, 0] and logabsdet[3].isnan()
    assert info[[0, 1, 2, 4, 5]].tolist() == [0, dim, 1, 0, 0]
    assert torch.equal(inverse[0], A[0]) and torch.equal(inverse[4], A[4])
    torch.testing.assert_close(inverse[5] * 1e-30, A[0])
    assert inverse[3].isnan().any()
    twice = cupy_linear.slogdet_inverse(A[[3, 0]])  # neighbours of a NaN
    assert torch.equal(twice[2][1], A[0])
