"""The work before and behind the flow's kernels: packed parameters, portions of the backward, sums over rows."""

import itertools

import pytest
import torch
from flow_values import DIRECTIONS, compare, error, run, tensors

from glf_fast import ops

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize(("rows", "parts"), [(8192, 8), (8193, 1), (1024 * 6, 4), (1000, 1)])
def test_sums_over_many_rows_go_in_parts(rows: int, parts: int, monkeypatch) -> None:
    from glf_fast.kernels import portions

    # (K, rows, n) inside wider rows, as in the workspace; the right operand's steps lie further apart, as saved inputs do.
    a = torch.randn(2, rows, 9, dtype=torch.float64)[..., 2:7]
    b = torch.randn(2, rows + 5, 3, dtype=torch.float64)[:, 5:]
    seen: list[int] = []
    plain = portions.bmm
    monkeypatch.setattr(portions, "bmm", lambda x, y: (seen.append(len(x)), plain(x, y))[1])
    torch.testing.assert_close(portions.over_rows(a, b, 18), a.mT @ b)
    assert seen == [2 * parts]


def test_large_batches_and_deep_flows_go_in_portions(monkeypatch) -> None:
    from glf_fast.kernels import portions as dividing
    from glf_fast.kernels.launch import count_launches

    values = tensors(40, 3, 5, 2, (9, 9))
    whole = run(ops.coupling_flow, values, activation="silu")
    monkeypatch.setattr(dividing, "WORKSPACE_BYTES", 1)
    for direction, reversible in itertools.product(DIRECTIONS, (False, True)):
        compare(tensors(20, 2, 5, 2, (9, 9)), direction, 1e-12, reversible, activation="silu")
    with count_launches() as launched:
        portions = run(ops.coupling_flow, values, activation="silu")
    assert launched.count("flow_backward_kernel") == 9  # 16 rows and one step each
    assert launched.count("pack_kernel") == 1 + 3
    for a, b in zip(portions, whole, strict=True):
        assert error(a, b) < 1e-14


def test_the_workspace_stays_within_its_bound(monkeypatch) -> None:
    from glf_fast.kernels import coupling_flow_backward, portions

    monkeypatch.setattr(portions, "WORKSPACE_BYTES", 60_000)
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
    from glf_fast.kernels.launch_table import Launch
    from glf_fast.kernels.portions import WORKSPACE_BYTES, portions

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
