"""Linear layers in CUDA on the GPU: the reference in float64, LAPACK's scaled residuals, graphs, repetition."""

import linear_zoo
import pytest
import torch
from torch import Tensor

from glf_fast import CouplingFlow, backends, ops, reference, use_backend
from glf_fast.ops.linear import cupy as cupy_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends()["cuda"].startswith("ready"), reason=f"backend cuda: {backends()['cuda']}"),
]
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def on_cuda_kernels():
    """Compiled by nvcc when glf_fast was installed, or where it was not by NVRTC through CuPy."""
    with use_backend("cuda"):
        yield


def layers(K: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(D)
    normal = lambda *shape: torch.randn(K, *shape, generator=g, dtype=torch.float64)  # noqa: E731
    floats = [normal(D, D) / D**0.5, normal(D, D) / D**0.5, 0.3 * normal(D), 0.3 * normal(D), 0.3 * normal(D)]
    order = torch.rand(K, D, generator=g).argsort(-1)
    return order.cuda(), normal(D).sign().to("cuda", dtype), [t.to("cuda", dtype).requires_grad_() for t in floats]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 5, 20, 32, 33, 64, 128, 192])
def test_plu_assemble_matches_the_reference(dim: int, dtype: torch.dtype) -> None:
    def everything(op, dtype: torch.dtype) -> list[Tensor]:
        order, sign, tensors = layers(8, dim, dtype)
        lower, upper, log_diag, log_scale, bias = tensors
        out = op(order, lower, upper, log_diag, sign, log_scale, bias)
        g = torch.Generator().manual_seed(0)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to("cuda", dtype) for t in out]
        loss = sum((w * t).sum() for w, t in zip(weights, out, strict=True))
        return [*(t.detach() for t in out), *torch.autograd.grad(loss, tensors)]

    exact, plain = everything(reference.plu_assemble, torch.float64), everything(reference.plu_assemble, dtype)
    for mine, theirs, truth in zip(everything(ops.plu_assemble, dtype), plain, exact, strict=True):
        error = lambda t: float((t.double() - truth).norm() / truth.norm().clamp_min(1e-9))  # noqa: B023, E731
        assert error(mine) <= max(4 * error(theirs), 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dim", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65, 96, 97, 128, 129, 192, 193, 250]
)
def test_the_zoo_by_scaled_residuals(dim: int, dtype: torch.dtype) -> None:
    named = linear_zoo.zoo(dim, dtype)
    del named["growth"]
    for name, matrix in named.items():
        _, _, inverse, info = (t.cpu() for t in ops.slogdet_inverse(matrix.cuda()))
        assert info == 0
        if torch.linalg.cond(matrix.double()) * dim * torch.finfo(dtype).eps < 1e-2:
            assert linear_zoo.inverse_residual(matrix, inverse) < linear_zoo.LIMIT, name


@pytest.mark.parametrize("dim", [1, 4, 7, 16, 20, 32, 40, 64, 80])
@pytest.mark.parametrize("count", [0, 1, 7, 10_000])
def test_batches_of_every_size(count: int, dim: int) -> None:
    A = torch.randn(count, dim, dim, generator=torch.Generator().manual_seed(0))
    sign, logabsdet, inverse, info = ops.slogdet_inverse(A.cuda())
    again = ops.slogdet_inverse(A.cuda())
    assert all(torch.equal(a, b) for a, b in zip((sign, logabsdet, inverse, info), again, strict=True))
    if count:
        assert linear_zoo.inverse_residual(A, inverse.cpu()) < linear_zoo.LIMIT
        assert torch.equal(sign.cpu().double(), torch.linalg.slogdet(A.double()).sign)


@pytest.mark.parametrize("dim", [1, 5, 32, 33, 64, 70, 130, 200])
def test_singular_matrices_and_nan(dim: int) -> None:
    A = torch.eye(dim).repeat(3, 1, 1)
    A[1, -1, -1] = 0
    A[2, dim // 2, 0] = float("nan")
    sign, logabsdet, _, info = (t.cpu() for t in ops.slogdet_inverse(A.cuda()))
    assert sign[:2].tolist() == [1, 0] and logabsdet[:2].tolist() == [0, -torch.inf] and info[:2].tolist() == [0, dim]
    assert logabsdet[2].isnan()


# One source, two compilers: each operation once more by CuPy's, in both types, with matrices for a warp, a tile and a block.
BY_NVRTC = (
    (test_plu_assemble_matches_the_reference, (20, torch.float32)),
    (test_plu_assemble_matches_the_reference, (64, torch.float64)),
    (test_plu_assemble_matches_the_reference, (192, torch.float32)),
    (test_the_zoo_by_scaled_residuals, (7, torch.float32)),
    (test_the_zoo_by_scaled_residuals, (16, torch.float64)),
    (test_the_zoo_by_scaled_residuals, (32, torch.float32)),
    (test_the_zoo_by_scaled_residuals, (64, torch.float64)),
    (test_the_zoo_by_scaled_residuals, (193, torch.float64)),
    (test_the_zoo_by_scaled_residuals, (250, torch.float32)),
    (test_batches_of_every_size, (10_000, 20)),
    (test_singular_matrices_and_nan, (130,)),
)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")  # that nvcc's are overridden
@pytest.mark.parametrize(("test", "arguments"), BY_NVRTC, ids=[f"{t.__name__}-{a}" for t, a in BY_NVRTC])
def test_compiled_by_nvrtc(test, arguments) -> None:
    """Where nvcc compiled them these kernels replace its own; where it did not, they are what all tests above have run."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    with torch.library._scoped_library("glf_fast", "IMPL") as library:
        if not backends()["cuda"].endswith("CuPy"):
            cupy_linear.register(library, override=True)
        test(*arguments)


def test_tensors_on_the_processor_are_refused() -> None:
    order, sign, tensors = layers(2, 5, torch.float32)
    lower, upper, log_diag, log_scale, bias = (t.detach() for t in tensors)
    with pytest.raises(ValueError, match="permutation is on cpu but the rest is on cuda"):
        ops.plu_assemble(order.cpu(), lower, upper, log_diag, sign, log_scale, bias)
    for index, factor in ((order.cpu(), upper), (order, upper.cpu())):  # by the operation, whose kernel would read them
        with pytest.raises(RuntimeError, match=r"a kernel on cuda:0 got a tensor on cpu|tensors of several devices"):
            torch.ops.glf_fast.plu_assemble.default(index, lower, factor, log_diag, sign, log_scale, bias, True)


def test_indices_out_of_range_stay_within_their_layer() -> None:
    order, sign, tensors = layers(3, 40, torch.float32)
    lower, upper, log_diag, log_scale, bias = tensors
    wrong = order.clone()
    wrong[1, [0, 3, 4]] = torch.tensor([1 << 40, -5, 40], device="cuda")
    got, want = (ops.plu_assemble(o, lower, upper, log_diag, sign, log_scale, bias) for o in (wrong, order))
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])
    torch.autograd.grad(sum(t.sum() for t in got), tensors)


def test_a_graph_replays_the_same() -> None:
    order, sign, tensors = layers(8, 64, torch.float32)
    lower, upper, log_diag, log_scale, bias = (t.detach() for t in tensors)

    def run() -> list[Tensor]:
        A, A_inv, c, logabsdet = ops.plu_assemble(order, lower, upper, log_diag, sign, log_scale, bias)
        return [A, A_inv, c, logabsdet, *ops.slogdet_inverse(A), *ops.slogdet_inverse(A[:, :20, :20].contiguous())]

    want = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("linear", ["plu", "dense"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it is a prototype
def test_a_flow_never_waits_and_equals_the_reference(linear: str) -> None:
    torch.manual_seed(0)
    flow = CouplingFlow(9, 3, (16,), linear=linear).double().cuda()
    x = torch.randn(30, 9, dtype=torch.float64, device="cuda")
    flow(x)
    found = []
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            z, logdet = flow(x)
            loss = (z**2).sum() - logdet.sum()
            found.append([z.detach(), logdet.detach(), *torch.autograd.grad(loss, list(flow.parameters()))])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    try:
        torch.cuda.set_sync_debug_mode("error")
        ops.slogdet_inverse(torch.eye(5, device="cuda"))
        with torch.no_grad():
            flow(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inverse", [False, True])
def test_600_000_right_hand_sides(inverse: bool) -> None:
    A = torch.randn(2, 3, 3, dtype=torch.float64, device="cuda")
    _, logabsdet, A_inv, _ = ops.slogdet_inverse(A)
    c, x = torch.randn(3, dtype=torch.float64), torch.randn(600_000, 3, dtype=torch.float64)
    matrix = A_inv[1] if inverse else A[1]
    y, _ = ops.invertible_linear(x.cuda(), matrix, c.cuda(), logabsdet[1], inverse=inverse)
    want = (x - c) @ matrix.cpu() if inverse else x @ matrix.cpu() + c
    torch.testing.assert_close(y.cpu(), want)
