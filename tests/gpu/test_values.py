"""On a GPU: values and gradients of the kernels against float64, in every precision."""

import itertools

import flow_values
import pytest
import torch
from torch import Tensor

from glf_fast import ops, reference
from glf_fast.kernels.launch import count_launches
from glf_fast.reference import ACTIVATIONS, LOG_SCALES

pytestmark = pytest.mark.gpu

DIRECTIONS = {"forward": "coupling_flow", "inverse": "coupling_flow_inverse"}
# name → torch's matmul precision and autocast: of ours, and of plain PyTorch in the same precision. "medium" is bf16 operands
# to us, while cuBLAS makes no difference between "high" and "medium".
PRECISIONS = {
    "highest": (("highest", None), ("highest", None)),
    "high": (("high", None), ("high", None)),
    "medium": (("medium", None), ("high", torch.bfloat16)),
    "bfloat16 autocast": (("highest", torch.bfloat16), ("highest", torch.bfloat16)),
    "float16 autocast": (("highest", torch.float16), ("highest", torch.float16)),
}
# D, hidden, context: of each size class of the launch table, with odd widths among them.
SIZES = {
    "small": (20, (64, 64), 0),
    "context": (7, (50, 33), 16),
    "deep": (31, (40, 64, 17, 64), 3),
    "medium": (64, (256, 256), 0),
    "large": (128, (512, 512), 0),
    "huge": (255, (300, 512), 0),
}


def rehearsed(device: torch.device) -> bool:
    return device.type == "cpu"


def tensors(device: torch.device, batch: int, K: int, D: int, C: int, hidden: tuple[int, ...]) -> list[Tensor | None]:
    """x, A, c, context, W₀ …, b₀ …, float32 numbers in float64."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).double()

    widths = [D - D // 2 + C, *hidden, 2 * (D // 2)]
    A = torch.linalg.qr(normal(K, D, D)).Q.contiguous().float().double()
    weights = [(normal(K, n, m) / n**0.5).float().double() for n, m in itertools.pairwise(widths)]
    biases = [(0.3 * normal(K, n)).float().double() for n in widths[1:]]
    made = [normal(batch, D), A, normal(K, D), normal(batch, C) if C else None, *weights, *biases]
    return [None if t is None else t.to(device) for t in made]


def run(op, values: list[Tensor | None], dtype: torch.dtype, **options) -> list[Tensor]:
    """Output, logdet, and the gradients of a fixed combination of them."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in values]
    x, A, c, context, *layers = leaves
    results = op(x, A, c, layers[: len(layers) // 2], layers[len(layers) // 2 :], context, **options)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=g).to(t) for t in results]
    # The reference's logdet of additive couplings is a constant.
    varying, grads = zip(*((t, g) for t, g in zip(results, grads, strict=True) if t.requires_grad), strict=True)
    found = torch.autograd.grad(varying, [t for t in leaves if t is not None], grads)
    return [t.detach() for t in (*results, *found)]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_at_most_twice_the_error_of_plain_pytorch(precision: str, direction: str, size: str, device) -> None:
    if rehearsed(device) and (precision != "highest" or size in ("medium", "large", "huge")):
        pytest.skip(
            "on a processor plain PyTorch has no tf32, the interpreter no bfloat16, and wide flows take minutes"
        )
    dim, hidden, context = SIZES[size]
    values = tensors(device, 17 if rehearsed(device) else 300, 3, dim, context, hidden)
    ours, plain = PRECISIONS[precision]
    exact = run(getattr(reference, DIRECTIONS[direction]), values, torch.float64)
    errors = []
    for module, (setting, autocast) in ((ops, ours), (reference, plain)):
        torch.set_float32_matmul_precision(setting)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            found = run(getattr(module, DIRECTIONS[direction]), values, torch.float32)
        errors.append([error(a, b) for a, b in zip(found, exact, strict=True)])
    names = ["out", "logdet", "x", "A", "c", *["context"] * bool(context)]
    names += [f"{kind}{i}" for kind in "Wb" for i in range(len(hidden) + 1)]
    ulp = torch.finfo(torch.float32).eps  # where plain PyTorch happens to be exact
    worse = {n: (a, b) for n, a, b in zip(names, *errors, strict=True) if not a <= 2 * b + ulp}
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
    exact = run(getattr(reference, op), values, torch.float64, log_scale="glow")
    for ours, theirs in zip(run(getattr(ops, op), values, torch.float32, log_scale="glow"), exact, strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("add_first", [False, True])
@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("shape", [(300, 10), (3, 6, 5, 7), (16, 12, 16, 16)])
def test_the_elementwise_coupling(shape, log_scale: str, add_first: bool, inverse: bool, device, poisoned) -> None:
    """In both orders of memory, with u and t as chunks of one network's output, in float32 and bfloat16."""
    options = {"log_scale": log_scale, "add_first": add_first, "inverse": inverse}
    g = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=g).to(device)
    raw = torch.randn((shape[0], 2 * shape[1], *shape[2:]), generator=g).to(device)
    orders = [torch.contiguous_format, torch.channels_last] if len(shape) == 4 else [torch.contiguous_format]
    for order, low in itertools.product(orders, (torch.float32, torch.bfloat16)):
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
    with count_launches() as launches:
        run(getattr(ops, DIRECTIONS[direction]), values, torch.float32)
    assert launches == ["flow_kernel", "flow_backward_kernel"]
