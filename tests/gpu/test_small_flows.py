"""On a GPU: small and medium coupling flows by the CUDA kernels, which come before Triton's; the small ones by those, too."""

import pytest
import torch
from exact_flows import error, names, run, tensors

from glf_fast import backends, ops, reference, use_backend
from glf_fast.kernels.launch import count_launches
from glf_fast.ops.coupling_flow import small
from glf_fast.ops.coupling_flow.small import BF16, FLOAT32, TF32, FlowShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends()["cuda"].startswith("ready"), reason=f"backend cuda: {backends()['cuda']}"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="matrix units without tf32"
    ),
]
SIZES = {"small": (20, (64, 64), 0), "context": (7, (50, 33), 16), "three layers": (31, (40, 64, 17), 3)}
# torch's precision → those of the kernels' maps and networks, and how far results are from float64's.
PRECISIONS = {"highest": (FLOAT32, FLOAT32, 2e-5), "high": (TF32, TF32, 1e-2), "medium": (FLOAT32, BF16, 5e-2)}


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def test_both_backends_of_small_flows(size: str, precision: str, backend: str, device, poisoned) -> None:
    """Without being told, CUDA's kernels; Triton's where they are asked for."""
    dim, hidden, context = SIZES[size]
    torch.set_float32_matmul_precision(precision)
    values = tensors(device, 290, 3, dim, context, hidden)
    exact = run(reference.coupling_flow, values, torch.float64, activation="tanh")
    with use_backend(backend), count_launches() as tritons:
        found = run(ops.coupling_flow, values, torch.float32, activation="tanh")
    assert bool(tritons) == (backend == "triton")
    for name, a, b in zip(names(values), found, exact, strict=True):
        assert error(a, b) < PRECISIONS[precision][2], name


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no clusters of blocks"
)
@pytest.mark.parametrize("blocks", [8, 16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("rows", "dim", "hidden", "context"),
    [
        (256, 64, (256, 256), 0),
        (1, 64, (256, 256), 5),
        (70, 33, (17, 300, 65), 64),
        (17, 40, (70,), 0),
        (40, 2, (512, 9, 65, 129), 3),
    ],
)
def test_medium_flows_by_clusters(rows, dim, hidden, context, precision: str, blocks: int, device, poisoned) -> None:
    """In two launches, twice, and in one: all the same, bit for bit, and near float64's. Then back by the inverse."""
    if blocks > 8 and small.CUPY:
        pytest.skip("CuPy launches clusters of eight blocks")
    values = tensors(device, rows, 3, dim, context, hidden)
    x, A, c, given, *layers = [None if t is None else t.float() for t in values]
    half, tolerance = len(hidden) + 1, PRECISIONS[precision][2]
    s = FlowShape(3, dim, context, hidden, *PRECISIONS[precision][:2], blocks=blocks)
    options = small.Options("gelu", "tanh", 2.0, False, False, True)
    grad_logdet, grad_context = (
        torch.linspace(-1, 1, rows, device=device),
        None if given is None else torch.empty_like(given),
    )
    call = (s, options, x, A, c, None, layers[:half], layers[half:], given)
    out, density, kept, made = small.density_gradient(*call, grad_logdet, grad_context)
    found = [t.clone() for t in (density, made.x, *_flat(small.parameter_gradients(s, kept, made)))]
    for _ in range(2):
        again, density, buffer = small.forward_and_keep(*call)
        kept = small.kept_parts(s, "gelu", rows, buffer)
        made = small.backward(s, options, kept, again, None, grad_logdet, grad_context)
        for a, b in zip(found, (density, made.x, *_flat(small.parameter_gradients(s, kept, made))), strict=True):
            assert torch.equal(a, b)
    leaves = [None if t is None else t.double().requires_grad_() for t in values]
    zero = torch.zeros((), device=device, dtype=torch.float64)
    exact = reference.coupling_flow_log_prob(
        *leaves[:3], zero, leaves[4 : 4 + half], leaves[4 + half :], leaves[3], activation="gelu"
    )
    asked = [leaves[0], leaves[1], leaves[2], *leaves[4:]]
    for a, b in zip(found, [exact.detach(), *torch.autograd.grad((exact * grad_logdet).sum(), asked)], strict=True):
        assert error(a, b) < 4 * tolerance
    inverse = options._replace(inverse=True, density=False)
    back, _ = small.forward(s, inverse, out, torch.linalg.inv(A).contiguous(), *call[4:])
    assert error(back, x.double()) < 10 * tolerance


def _flat(gradients) -> list[torch.Tensor]:
    matrix, offset, weights, biases = gradients
    return [matrix, offset, *weights, *biases]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 70, 5000])
def test_both_ways_in_one_launch(rows: int, precision: str, device, poisoned) -> None:
    """The same, bit for bit, as in two."""
    torch.set_float32_matmul_precision(precision)
    x, A, c, context, *layers = [t.float() for t in tensors(device, rows, 2, 20, 3, (64, 33))]
    s = FlowShape(2, 20, 3, (64, 33), *PRECISIONS[precision][:2])
    grad_logdet, grad_context = torch.linspace(-1, 1, rows, device=device), torch.empty_like(context)
    options = small.Options("gelu", "tanh", 2.0, False, False, True)
    call = (s, options, x, A, c, None, layers[:3], layers[3:], context, grad_logdet, grad_context)
    _, density, kept, made = small.density_gradient(*call)
    grad_A, grad_c, grad_weights, grad_biases = small.parameter_gradients(s, kept, made)
    leaves = [t.requires_grad_() for t in (x, A, c, context, *layers)]
    zero = torch.zeros((), device=device)
    found = ops.coupling_flow_log_prob(x, A, c, zero, layers[:3], layers[3:], context, activation="gelu")
    grads = torch.autograd.grad((found * grad_logdet).sum(), leaves)
    assert torch.equal(density, found)
    for a, b in zip((made.x, grad_A, grad_c, grad_context, *grad_weights, *grad_biases), grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 16, 17, 2113, 16_384])
def test_there_and_back(rows: int, device, poisoned) -> None:
    """From a multiprocessor with one warp to all with eight."""
    x, A, c, _, *layers = [None if t is None else t.float() for t in tensors(device, rows, 3, 20, 0, (64, 64))]
    half = len(layers) // 2
    with torch.no_grad(), count_launches() as tritons:
        z, logdet = ops.coupling_flow(x, A, c, layers[:half], layers[half:])
        back, negative = ops.coupling_flow_inverse(z, torch.linalg.inv(A), c, layers[:half], layers[half:])
    assert not tritons
    assert error(back, x.double()) < 1e-4 and error(negative, -logdet.double()) < 1e-4
