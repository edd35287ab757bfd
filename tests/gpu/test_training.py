"""On a GPU: the flow under torch.compile, CUDA graphs, DistributedDataParallel, and its memory."""

import math

import pytest
import torch
from torch import Tensor

from glf_fast import AutoregressiveFlow, CouplingFlow

pytestmark = pytest.mark.gpu


def started(device: torch.device, steps: int = 2, kind=CouplingFlow, **options):
    """A flow after its data-dependent start, with parameters a little off their initial values."""
    torch.manual_seed(0)
    flow = kind(6, steps, (16, 16), **options)
    flow(torch.randn(64, 6))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return flow.to(device)


def step(f, flow, x: Tensor) -> list[Tensor]:
    """z, logdet and the gradients of all parameters, copied: a graph's next replay overwrites its results."""
    z, logdet = f(x)
    grads = torch.autograd.grad(z.square().sum() / 2 - logdet.sum(), list(flow.parameters()), allow_unused=True)
    return [t.detach().clone() for t in (z, logdet, *grads) if t is not None]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", [CouplingFlow, AutoregressiveFlow])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*TensorFloat32:UserWarning")
def test_compiled_without_graph_breaks(mode: str, kind, device) -> None:
    torch.compiler.reset()
    flow = started(device, kind=kind)
    compiled = torch.compile(flow, fullgraph=True, dynamic=mode == "default", mode=mode)
    for batch in (8, 8, 8, 13):  # a graph is recorded at the second call and replayed from the third on
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(batch, 6, device=device)
        assert_same(step(compiled, flow, x), step(flow, flow, x))
    torch.compiler.reset()


@pytest.mark.parametrize("options", [{}, {"reversible": True}, {"kind": AutoregressiveFlow}])
def test_captured_and_replayed(options, device) -> None:
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    flow = started(device, **options)
    x = torch.randn(32, 6, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(flow, flow, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(flow, flow, x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(32, 6))
        graph.replay()
        assert_same(results, step(flow, flow, x))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_flow_learns(autocast: torch.dtype | None, device) -> None:
    if device.type == "cpu" and autocast:
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly, so the launcher refuses them")
    torch.manual_seed(0)
    flow = CouplingFlow(4, 2, (16,)).to(device)
    data = torch.randn(64, 4, device=device)
    data[:, 1] = data[:, 0] ** 2 + 0.1 * data[:, 1]
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = -flow.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0] - 0.1


def test_distributed_data_parallel(device, tmp_path, monkeypatch) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    for library in (
        "NCCL",
        "GLOO",
    ):  # both look for an interface to meet at, and a machine without a network has only this
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "lo")

    flow = started(device)
    x = torch.randn(16, 6, device=device)
    want = step(flow, flow, x)[2:]
    cuda = device.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(flow, device_ids=[0] if cuda else None)
        z, logdet = wrapped(x)
        (z.square().sum() / 2 - logdet.sum()).backward()
        assert_same([p.grad for p in flow.parameters() if p.grad is not None], want)
    finally:
        dist.destroy_process_group()


def test_reversible_memory_is_flat_in_the_steps(device) -> None:
    if device.type == "cpu":
        pytest.skip("peak memory is counted by CUDA's allocator; tests/kernels counts saved tensors without one")
    rows = 200_000  # enough for the backward's workspace to be at its bound at either depth

    def peak(steps: int, reversible: bool) -> int:
        """Bytes of a forward and backward beyond parameters, input, and what belongs to each step's parameters."""
        flow = started(device, steps, reversible=reversible)
        x = torch.randn(rows, 6, device=device, requires_grad=True)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            z, logdet = flow(x)
            torch.autograd.grad(z.sum() + logdet.sum(), [x])
            del z, logdet
        return torch.cuda.max_memory_allocated() - before

    state = rows * 6 * 4
    # Where steps go in portions, the rows that were rebuilt wait between two of them: one more `state`.
    assert peak(32, True) - peak(4, True) < 2 * state
    assert peak(32, False) - peak(4, False) > 20 * state
