"""CUDA through CuPy without a GPU: NVRTC compiles the kernels, and the launches run on the host, argument by argument."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import linear_zoo
import numpy as np
import pytest
import torch

from glf_fast import reference
from glf_fast.ops import cupy_linear

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler is needed"
    target = tmp_path_factory.mktemp("host") / "host_kernels.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    source = ROOT / "tests" / "csrc" / "host_kernels.cpp"
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", source, "-o", target], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(params=[227 << 10, 4 << 10], ids=["227 KiB", "4 KiB"])
def on_host(library, monkeypatch, request):
    """Launches are calls of the host's library; blocks have this much shared memory. Results are poisoned with NaN."""

    def launch(name: str, _: torch.device, grid: int, block: int, shared: int, arguments: tuple) -> None:
        assert block in (128, 256) and shared <= request.param
        values = [np.asarray(a, np.int64 if isinstance(a, int) else None).reshape(1) for a in arguments]
        sizes = (ctypes.c_int * len(values))(*(v.itemsize for v in values))
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        failure = library.launch(name.encode(), ctypes.c_longlong(grid), shared, len(values), sizes, pointers)
        assert not failure, ("", f"there is no {name}", f"{name} takes arguments of other sizes than {[*sizes]}")[
            failure
        ]

    monkeypatch.setattr(cupy_linear, "launch", launch)
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
    factors, pivots, info_too = cupy_linear.lu_factor(A.to(dtype))
    exact = torch.linalg.slogdet(A.to(dtype).double())
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(logabsdet.double(), exact.logabsdet, **tolerance)
    assert torch.equal(sign.double(), exact.sign) and not info.any() and not info_too.any()
    eye = torch.eye(dim, dtype=torch.float64).expand(count, dim, dim)
    torch.testing.assert_close(A.to(dtype).double() @ inverse.double(), eye, **tolerance)
    assert torch.equal(pivots, torch.linalg.lu_factor(A.to(dtype)).pivots)
    torch.testing.assert_close(factors, torch.linalg.lu_factor(A.to(dtype)).LU, **tolerance)


@pytest.mark.parametrize("actnorm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 20, 33])
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
    # Only the gradients that are there.
    alone = cupy_linear.plu_assemble_backward(order, *found, got[0], None, weights[0].to(dtype), None, None, None)
    truth = torch.autograd.grad(
        (weights[0] * reference.plu_assemble(order, *exact)[0]).sum(), leaves, allow_unused=True
    )
    for mine, theirs in zip(alone, truth, strict=True):
        torch.testing.assert_close(
            mine.double(), torch.zeros_like(mine.double()) if theirs is None else theirs, **tolerance
        )


def test_what_does_not_fit_is_refused(on_host) -> None:
    with pytest.raises(RuntimeError, match="matrices"):
        cupy_linear.lu_factor(torch.zeros(3, 2, 4))
    with pytest.raises(RuntimeError, match="contiguous"):
        cupy_linear.slogdet_inverse(torch.zeros(3, 4, 4).mT)
    with pytest.raises(RuntimeError, match="int64"):
        eye = torch.zeros(1, 2, 2)
        cupy_linear.plu_assemble(torch.zeros(1, 2, dtype=torch.int32), eye, eye, eye[0], eye[0], None, None, True)


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
    from glf_fast.ops import linear
    assert linear._compiled(torch.empty(2, 192, 192, device="cuda"))
    assert not linear._compiled(torch.empty(2, 193, 193, device="cuda"))  # torch.linalg's
assert inverse.shape == (5, 3, 3) and sign.device.type == "cuda"
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nvrtc_compiles_every_kernel() -> None:
    """As CuPy does it on a GPU, but for its driver: to machine code of an H100."""
    nvrtc = pytest.importorskip("cupy", reason="needs CuPy, which has no wheel for this machine").cuda.nvrtc
    program = nvrtc.createProgram(cupy_linear.SOURCE, "linear.cu", (), ())
    for name in cupy_linear.KERNELS:
        nvrtc.addNameExpression(program, name)
    try:
        nvrtc.compileProgram(program, ("--gpu-architecture=sm_90", "-Werror=all-warnings", *cupy_linear.OPTIONS))
    finally:
        log = nvrtc.getProgramLog(program)
    assert not log.strip(), log
    names = {nvrtc.getLoweredName(program, name) for name in cupy_linear.KERNELS}
    assert len(names) == len(cupy_linear.KERNELS) == 2 * 4 + 2 * (7 + 5) + 3 + 3
    cubin = nvrtc.getCUBIN(program)
    assert all(name.encode() in cubin for name in names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dim", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25, 31, 32, 33, 48, 49, 63, 64, 65, 80, 96, 97, 128, 129, 192, 193]
)
def test_the_zoo_by_scaled_residuals(on_host, dim: int, dtype: torch.dtype) -> None:
    named = linear_zoo.zoo(dim, dtype)
    del named["growth"]
    matrices = torch.stack([*named.values()])
    sign, logabsdet, inverse, info = cupy_linear.slogdet_inverse(matrices)
    factors, pivots, _ = cupy_linear.lu_factor(matrices)
    exact = torch.linalg.slogdet(matrices.double())
    assert not info.any()
    for i, (name, matrix) in enumerate(named.items()):
        assert linear_zoo.factor_residual(matrix, factors[i], pivots[i]) < linear_zoo.LIMIT, name
        rounding = dim * torch.finfo(dtype).eps * float(torch.linalg.cond(matrix.double()))
        if rounding < 1e-2:
            assert linear_zoo.inverse_residual(matrix, inverse[i]) < linear_zoo.LIMIT, name
            assert linear_zoo.inverse_residual(matrix.mT, inverse[i].mT) < linear_zoo.LIMIT, name
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
