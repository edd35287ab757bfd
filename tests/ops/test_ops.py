"""The operations: derivatives of first and second order, and errors that name what is wrong."""

import itertools
import shutil
from pathlib import Path

import forked
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import glf_fast
from glf_fast import backends, ops, reference
from glf_fast.reference import ACTIVATIONS, LOG_SCALES


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("add_first", [False, True])
@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_affine_coupling_derivatives(log_scale: str, add_first: bool, inverse: bool) -> None:
    torch.manual_seed(0)
    v, u, t = double(2, 3), double(2, 3), double(2, 3)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(*tensors, log_scale=log_scale, add_first=add_first, inverse=inverse)

    assert gradcheck(run, (v, u, t))
    assert gradgradcheck(run, (v, u, t))


def flow_tensors(K: int = 2, D: int = 3, C: int = 1, hidden: tuple[int, ...] = (4,)) -> list[Tensor]:
    """x, A, c, context, W₀, b₀, W₁, b₁ …"""
    widths = [D - D // 2 + C, *hidden, 2 * (D // 2)]
    tensors = [double(2, D), double(K, D, D), double(K, D), double(2, C)]
    for n_in, n_out in itertools.pairwise(widths):
        tensors += [double(K, n_in, n_out), double(K, n_out)]
    return tensors


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", [ops.coupling_flow, ops.coupling_flow_inverse])
def test_coupling_flow_derivatives(op, activation: str) -> None:
    torch.manual_seed(0)

    def run(x: Tensor, A: Tensor, c: Tensor, context: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor]:
        return op(x, A, c, layers[0::2], layers[1::2], context, activation=activation)

    tensors = flow_tensors()
    assert gradcheck(run, tensors, fast_mode=True)
    assert gradgradcheck(run, tensors, fast_mode=True)


def test_plu_assemble_derivatives() -> None:
    torch.manual_seed(0)
    permutation = torch.stack([torch.randperm(3) for _ in range(2)])
    sign = torch.tensor([[1.0, -1, 1], [-1, -1, 1]], dtype=torch.float64)

    def run(lower: Tensor, upper: Tensor, log_diag: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ops.plu_assemble(permutation, lower, upper, log_diag, sign, log_scale, bias)

    tensors = (double(2, 3, 3), double(2, 3, 3), double(2, 3), double(2, 3), double(2, 3))
    assert gradcheck(run, tensors)


def test_slogdet_inverse_derivatives() -> None:
    torch.manual_seed(0)
    assert gradcheck(lambda W: ops.slogdet_inverse(W)[1:3], (double(2, 3, 3),))


@pytest.mark.parametrize("pixels", [(9,), (4, 5), (33, 40), (2, 3, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 17])
@pytest.mark.parametrize("inverse", [False, True])
def test_strided_inputs_give_the_same_as_packed_ones(pixels: tuple[int, ...], channels: int, inverse: bool) -> None:
    torch.manual_seed(0)
    both = torch.randn(3, *pixels, 2 * channels, dtype=torch.float64).movedim(-1, 1)  # channels last
    flipped = torch.randn(3, *pixels[::-1], channels, dtype=torch.float64).permute(0, -1, *range(len(pixels), 0, -1))
    packed = torch.randn(3, channels, *pixels, dtype=torch.float64)
    u, t = both.chunk(2, 1)
    for first, second, third in ((both[:, channels:], u, t), (packed, u, t), (u, packed, flipped), (flipped, t, u)):
        leaves = [x.detach().requires_grad_() for x in (first, second, third)]
        plain = [x.detach().contiguous().requires_grad_() for x in leaves]
        w, logdet = ops.affine_coupling(*leaves, inverse=inverse)
        want = reference.affine_coupling(*plain, inverse=inverse)
        torch.testing.assert_close((w, logdet), want)
        if not w.numel():
            continue
        # The next layer reads w as it reads v: an image whose channels lie side by side stays one.
        assert channels == 1 or (w.stride(1) == 1) == (first.stride(1) == 1)
        weights = torch.randn_like(want[0])
        loss = [(a * weights).sum() + (b**2).sum() for a, b in ((w, logdet), want)]
        torch.testing.assert_close(torch.autograd.grad(loss[0], leaves), torch.autograd.grad(loss[1], plain))


def test_affine_coupling_errors() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"got v \(2, 3\), u \(2, 2\), t \(2, 3\)"):
        ops.affine_coupling(x, x[:, :2], x)
    with pytest.raises(ValueError, match="two or more dimensions"):
        ops.affine_coupling(x[0], x[0], x[0])
    with pytest.raises(TypeError, match=r"u must be floating-point; got torch\.int64"):
        ops.affine_coupling(x, x.long(), x)
    with pytest.raises(ValueError, match=r"log_scale must be one of 'tanh', 'exp'.*got 'sigmoid'"):
        ops.affine_coupling(x, x, x, log_scale="sigmoid")
    for name, constant in (("tanh", 0.0), ("atan", -1.0), ("softclip", 1.0), ("nflows", float("nan"))):
        with pytest.raises(ValueError, match=f"log_scale_constant of '{name}' must be between 0.0 and"):
            ops.affine_coupling(x, x, x, log_scale=name, log_scale_constant=constant)
    with pytest.raises(ValueError, match="log_scale 'exp' has no constant; got log_scale_constant=2"):
        glf_fast.CouplingFlow(4, log_scale="exp", log_scale_constant=2.0)


@pytest.mark.parametrize("flow", [glf_fast.CouplingFlow, glf_fast.AutoregressiveFlow])
def test_constants_of_activations_name_themselves(flow) -> None:
    wrong = (
        ("leaky_relu", 0.0),
        ("elu", -1.0),
        ("elu", float("nan")),
        ("leaky_relu", float("inf")),
        ("elu", "1"),
        ("elu", True),
    )
    for name, constant in wrong:
        with pytest.raises(
            ValueError, match=f"activation_constant of '{name}' must be a number above 0 and below inf; got"
        ):
            flow(4, activation=name, activation_constant=constant)
    with pytest.raises(ValueError, match="activation 'gelu' has no constant; got activation_constant=2"):
        flow(4, activation="gelu", activation_constant=2.0)
    with pytest.raises(ValueError, match=r"activation must be one of 'relu', 'leaky_relu'.*got 'celu'"):
        flow(4, activation="celu")
    x, layers = torch.zeros(3, 2), ([torch.zeros(1, 1, 2)], [torch.zeros(1, 2)])
    with pytest.raises(ValueError, match="activation_constant of 'elu' must be"):
        ops.coupling_flow(x, torch.eye(2)[None], torch.zeros(1, 2), *layers, activation="elu", activation_constant=0.0)


@pytest.mark.parametrize("grad", [True, False], ids=["differentiable", "not"])
@pytest.mark.parametrize(
    ("index", "replacement", "message"),
    [
        (0, torch.tensor(0.0).double(), r"x must have shape \(batch, dim\) = \(any, 3\); got \(\)"),
        (0, torch.zeros(2, 4, dtype=torch.float64), r"x must have shape \(batch, dim\) = \(any, 3\); got \(2, 4\)"),
        (1, torch.zeros(2, 3, 4, dtype=torch.float64), r"A must have shape \(steps, dim, dim\) = \(2, 4, 4\)"),
        (2, torch.zeros(3, 3, dtype=torch.float64), r"c must have shape \(steps, dim\) = \(2, 3\); got \(3, 3\)"),
        (2, torch.zeros(1, 6, dtype=torch.float64), r"c must have shape \(steps, dim\) = \(2, 3\); got \(1, 6\)"),
        (3, torch.zeros(1, 1, dtype=torch.float64), r"context must have shape .* = \(2, any\); got \(1, 1\)"),
        (
            4,
            torch.zeros(2, 2, 4, dtype=torch.float64),
            r"weights\[0\] must have shape \(steps, in, out\) = \(2, 3, 4\)",
        ),
        (
            6,
            torch.zeros(2, 4, 5, dtype=torch.float64),
            r"weights\[1\] must have shape \(steps, in, out\) = \(2, 4, 2\)",
        ),
        (7, torch.zeros(2, 3, dtype=torch.float64), r"biases\[1\] must have shape \(steps, out\) = \(2, 2\)"),
        (7, torch.zeros(1, 4, dtype=torch.float64), r"biases\[1\] must have shape \(steps, out\) = \(2, 2\)"),
    ],
)
def test_coupling_flow_errors(index: int, replacement: Tensor, message: str, grad: bool) -> None:
    tensors = flow_tensors()
    tensors[index] = replacement
    x, A, c, context, *layers = tensors
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        ops.coupling_flow(x, A, c, layers[0::2], layers[1::2], context)


def test_errors_of_two_networks_and_additive_couplings() -> None:
    x, A, c, _, W0, b0, W1, b1 = flow_tensors(C=0)
    pair = [torch.stack([t, t], 1) for t in (W0, W1[..., :1], b0, b1[..., :1])]
    ops.coupling_flow(x, A, c, pair[:2], pair[2:], coupling="separate")
    ops.coupling_flow(x, A, c, [W0, W1[..., :1]], [b0, b1[..., :1]], coupling="additive")
    for coupling, weights, biases, message in (
        ("separate", pair[:2], [pair[2], b1], r"biases\[1\] .* \(steps, networks, out\) = \(2, 2, 1\); got \(2, 2\)"),
        (
            "separate",
            [pair[0], torch.stack([W1, W1], 1)],
            pair[2:],
            r"weights\[1\] .* = \(2, 2, 4, 1\); got \(2, 2, 4, 2\)",
        ),
        ("additive", [W0, W1[..., :1]], [b0, b1], r"biases\[1\] .* \(steps, out\) = \(2, 1\); got \(2, 2\)"),
        ("separate", [pair[0], W1], pair[2:], r"weights\[1\] .* = \(2, 2, 4, 1\); got \(2, 4, 2\)"),
        ("affine", pair[:2], pair[2:], r"weights\[0\] must have shape \(steps, in, out\) = \(2, 2, 4\)"),
        ("none", pair[:2], pair[2:], "coupling must be one of 'affine', 'separate', 'additive', 'spline'; got 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.coupling_flow(x, A, c, weights, biases, coupling=coupling)


@torch.no_grad()
def test_without_gradients_whatever_fits_is_taken_and_nothing_else() -> None:
    x, A, c, context, *layers = (t.detach().float() for t in flow_tensors())
    weights, biases = layers[0::2], layers[1::2]
    expected = ops.coupling_flow(x, A, c, weights, biases, context)[0]
    for index in range(len(weights)):
        strided = [*weights]
        strided[index] = weights[index].mT.contiguous().mT
        assert torch.equal(ops.coupling_flow(x, A, c, strided, biases, context)[0], expected)
    assert torch.equal(ops.coupling_flow(x.T.contiguous().T, A, c, weights, biases, context)[0], expected)
    half = ops.coupling_flow(x.bfloat16(), A, c, weights, biases, context)[0]
    assert half.dtype == torch.float32 and torch.equal(
        half, ops.coupling_flow(x.bfloat16().float(), A, c, weights, biases, context)[0]
    )
    for wrong in (
        (x.double(), context, weights),
        (x, context.double(), weights),
        (x, context, [w.double() for w in weights]),
    ):
        with pytest.raises(TypeError, match=r"torch\.float64.*convert one of them"):
            ops.coupling_flow(wrong[0], A, c, wrong[2], biases, wrong[1])


def test_linear_errors() -> None:
    eye, zero = torch.eye(3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"W must be square matrices \(…, D, D\); got \(2, 3\)"):
        ops.slogdet_inverse(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, dim, …\) = \(any, 3\); got \(5, 4\)"):
        ops.invertible_linear(torch.zeros(5, 4), eye, zero, zero[0])
    with pytest.raises(ValueError, match=r"upper must have shape \(…, D, D\) = \(3, 3\)"):
        ops.plu_assemble(torch.arange(3), eye, eye[:2], zero, zero)
    with pytest.raises(ValueError, match="log_scale and bias belong together"):
        ops.plu_assemble(torch.arange(3), eye, eye, zero, zero, zero)


def test_the_reference_backend_is_always_there() -> None:
    assert backends()["reference"].startswith("ready")


def test_a_missing_backend_is_said_once_and_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(glf_fast.__file__).parent
    shutil.copytree(package, tmp_path / "glf_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = """
import sys, warnings
sys.path.insert(0, ".")
warnings.simplefilter("always")
import torch, glf_fast
flow = glf_fast.CouplingFlow(4, 1, (8,))
flow(torch.randn(3, 4)), flow.sample(2)
print(glf_fast.backends()["cpp"])
with glf_fast.use_backend("cpp"):
    pass
"""
    # From that folder: the copy without its kernels, not the installed package.
    monkeypatch.chdir(tmp_path)
    done = forked.fresh(code)
    assert done.returncode == 1 and done.stdout.startswith("not built")
    assert done.stderr.count("slow reference") == 1 and "pip install -v --no-build-isolation" in done.stderr
    assert "RuntimeError: backend 'cpp' cannot run here: not built" in done.stderr


def test_a_backend_in_the_environment_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda:
        pytest.skip("this torch has CUDA")
    monkeypatch.setenv("GLF_FAST_BACKEND", "cuda")
    done = forked.fresh("import glf_fast")
    assert done.returncode and "GLF_FAST_BACKEND is 'cuda', which cannot run here: " in done.stderr
