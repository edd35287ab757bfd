"""Masked autoregressive flows in the whole-flow kernels, interpreted, against the float64 reference."""

import pytest
import torch
from autoregressive_flows import NAMES, flow_of, tensors
from flow_values import error, run_op

from glf_fast import AutoregressiveFlow, Spline, ops, reference, use_backend
from glf_fast.kernels.launch import count_launches
from glf_fast.reference import ACTIVATIONS, LOG_SCALES
from glf_fast.reference.made import masks

pytestmark = pytest.mark.usefixtures("interpreted")
BACKWARD = ["masked_pack_kernel", "autoregressive_backward_kernel", "sums_kernel"]


def compare(
    shape, inverse: bool, made: dict[str, object], limit: float = 1e-11, dtype=torch.float64, **options
) -> None:
    """Output, logdet and every gradient, of a flow of `shape` (rows, K, D, C, hidden widths)."""
    exact, seen = tensors(*shape, **made)
    kept = {name: value for name, value in made.items() if name != "ties"}
    want = run_op(flow_of(getattr(reference, NAMES[inverse]), seen, **kept, **options), exact)
    given = [None if t is None else t.detach().to(dtype).requires_grad_() for t in exact]
    with count_launches() as launches:
        got = run_op(flow_of(getattr(ops, NAMES[inverse]), seen, **kept, **options), given)
    assert launches == (["masked_pack_kernel", "autoregressive_kernel", *BACKWARD] if shape[0] else launches)
    for mine, truth in zip(got, want, strict=True):
        assert mine.dtype == dtype and mine.shape == truth.shape
        assert error(mine, truth) <= limit


# Shape, how it is made, activation, log-scale: every activation, log-scale, depth and way of a context; ties of features, units
# that nothing sees, no rows, two programs, one feature, chunks of units that end and begin anywhere.
FLOWS = [
    ((2, 2, 3, 0, (5,)), {}, "relu", "tanh"),
    ((3, 1, 3, 2, (6, 4)), {"context_layer": True, "ties": True}, "silu", "softplus"),
    ((1, 1, 2, 1, (4, 3, 5, 2)), {}, "silu", "glow"),
    ((2, 1, 1, 0, (3,)), {}, "tanh", "exp"),
    ((19, 1, 2, 1, (5,)), {"context_layer": True}, "elu", "nflows"),
    ((2, 1, 2, 0, (35, 18)), {}, "leaky_relu", "softclip"),
    ((0, 1, 2, 1, (3,)), {}, "relu", "tanh"),
    ((1, 1, 17, 0, (4,)), {"ties": True}, "gelu", "atan"),
    ((2, 1, 2, 17, (3,)), {"context_layer": True}, "tanh", "jet"),
    ((2, 1, 3, 0, (4,)), {}, "selu", "clamp"),
    ((2, 1, 3, 1, (4, 3)), {"context_layer": True}, "mish", "tanh"),
    ((3, 1, 2, 0, (5,)), {}, "hardswish", "glow"),
    ((3, 1, 2, 1, (4,)), {"context_layer": True}, "softplus", "tanh"),
    ((2, 1, 3, 0, (5,)), {}, "silu", "bayesflow"),
]


def test_the_cases_cover_every_formula() -> None:
    assert {case[2] for case in FLOWS} == set(ACTIVATIONS) and {case[3] for case in FLOWS} == set(LOG_SCALES)


@pytest.mark.parametrize("inverse", NAMES)
@pytest.mark.parametrize(("shape", "made", "activation", "log_scale"), FLOWS)
def test_values_and_gradients(shape, made, activation: str, log_scale: str, inverse: bool) -> None:
    compare(shape, inverse, made, activation=activation, log_scale=log_scale)


# Each parametrization and kind of tails; more slopes than bins' power of two; three features, which pairs do not divide.
SPLINES = [
    (Spline(2, parametrization="nflows"), False),
    (Spline(8, -3.0, 4.0, "none", "madnis"), True),
    (Spline(5, -2.0, 2.0, "circular", "zuko"), False),
    (Spline(9, parametrization="nflows"), True),
]


@pytest.mark.parametrize(("spline", "inverse"), SPLINES)
def test_splines(spline: Spline, inverse: bool) -> None:
    compare((2, 1, 3, 0, (3,)), inverse, {"transform": "spline", "spline": spline}, 1e-9)


@pytest.mark.parametrize("inverse", NAMES)
def test_float32(inverse: bool) -> None:
    compare((2, 1, 2, 1, (3,)), inverse, {}, 1e-5, torch.float32, activation="tanh")


def test_weights_beyond_the_fan_in_are_never_read() -> None:
    values, seen = tensors(2, 1, 2, 1, (3, 3))
    x, A, c, context, *layers = [t.detach() for t in values]
    weights, biases = layers[:3], layers[3:]
    used = masks([w[0] for w in weights], [b[0] for b in biases], seen[0], 2)
    spoilt = [w.masked_fill(~u, torch.nan).requires_grad_() for w, u in zip(weights, used, strict=True)]
    for name in NAMES.values():
        got, logdet = getattr(ops, name)(x, A, c, spoilt, biases, seen, context)
        for weight, grad in zip(spoilt, torch.autograd.grad(got.sum() + logdet.sum(), spoilt), strict=True):
            assert grad.isfinite().all() and (grad[weight.isnan()] == 0).all()


def test_density_learns_and_results_repeat() -> None:
    values, seen = tensors(3, 1, 2, 0, (4,))
    leaves = [*values, torch.ones((), dtype=torch.float64, requires_grad=True)]
    results = []
    for module in (ops, ops, reference):
        x, A, c, context, w, v, b, d, logabsdet = leaves
        found = module.autoregressive_flow_log_prob(x, A, c, logabsdet, [w, v], [b, d], seen, context)
        results.append([found, *torch.autograd.grad(found.sin().sum(), [t for t in leaves if t is not None])])
    for first, second, exact in zip(*results, strict=True):
        assert torch.equal(first, second) and error(first, exact) < 1e-12


@pytest.mark.parametrize(("inverse", "rows"), [(False, 17), (True, 2)])
def test_portions_are_the_whole(inverse: bool, rows: int, monkeypatch) -> None:
    """Steps one by one, and of the forward 16 rows and one."""
    from glf_fast.kernels import portions

    monkeypatch.setattr(portions, "WORKSPACE_BYTES", 1)
    values, seen = tensors(rows, 2, 2, 1, (3,))
    want, got = (run_op(flow_of(getattr(module, NAMES[inverse]), seen), values) for module in (reference, ops))
    assert all(error(a, b) < 1e-12 for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, from the interpreter
@pytest.mark.parametrize("inverse", NAMES)
def test_a_bad_row_stays_bad_and_alone(inverse: bool) -> None:
    values, seen = tensors(17, 1, 2, 0, (3,))
    x, A, c, _, *layers = [None if t is None else t.detach() for t in values]
    x[3, 0] = torch.nan
    x.requires_grad_()
    out, logdet = getattr(ops, NAMES[inverse])(x, A, c, layers[:2], layers[2:], seen, None)
    (grad,) = torch.autograd.grad(out.sum() + logdet.sum(), x)
    for t in (out, logdet, grad):
        broken = ~t.isfinite().view(17, -1).all(1)
        assert broken[3] and broken.sum() == 1


def test_a_flow_and_its_inverse_take_the_kernels() -> None:
    torch.manual_seed(0)
    flow = AutoregressiveFlow(2, 2, (3,), 1)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, context = torch.randn(2, 2), torch.randn(2, 1)
    with count_launches() as launches, torch.no_grad():
        z, logdet = flow(x, context)
        back, undone = flow.inverse(z, context)
        density = flow.log_prob(x, context)
    assert launches == ["masked_pack_kernel", "autoregressive_kernel"] * 3
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(undone, -logdet, rtol=1e-4, atol=1e-5)
    with use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(density, flow.log_prob(x, context), rtol=1e-4, atol=1e-5)


def test_opcheck() -> None:
    """Schemas and what torch.compile is told; tests/gpu compiles."""
    library, checks = torch.ops.glf_fast, ("test_schema", "test_faketensor")
    values, seen = tensors(1, 1, 1, 1, (1,))
    x, A, c, context, *layers = [t.detach().float() for t in values]
    network = (layers[:2], layers[2:], seen, context, "relu", 0.0, "tanh", 2.0, [], False, False, False, "")
    torch.library.opcheck(library.triton_autoregressive_flow.default, (x, A, c, *network, True), test_utils=checks)
    out, logdet, saved = library.triton_autoregressive_flow(x, A, c, *network, True)
    torch.library.opcheck(
        library.triton_autoregressive_flow_backward.default,
        (out, logdet, saved, A, c, *network, True, True),
        test_utils=checks,
    )


REFUSED = [
    ((257, (8,)), {}, "more than 256 columns"),
    ((4, (513,)), {}, "up to 512"),
    ((4, (8,) * 5), {}, "1 to 4 hidden layers"),
    ((4, (8,)), {"network": "residual"}, "other than an MLP"),
    ((4, (8,)), {"transform": "spline", "spline": Spline(17)}, "more than 16"),
]


@pytest.mark.parametrize(("shape", "made", "why"), REFUSED)
def test_others_take_plain_pytorch(shape, made: dict[str, object], why: str) -> None:
    from glf_fast.ops.autoregressive_flow import Call, _options, triton

    values, seen = tensors(2, 1, shape[0], 0, shape[1], **made)
    x, A, c, context, *layers = [None if t is None else t.detach() for t in values]
    half = len(layers) // 2
    options = {"transform": "affine", "network": "mlp", "spline": None} | made
    checked = _options(
        options["transform"], options["network"], "relu", None, "tanh", None, options["spline"], False, False, False
    )
    assert why in triton.refuses(Call(x, context, A, c, None, seen, layers[:half], layers[half:], checked))
    with count_launches() as launches:
        ops.autoregressive_flow(x, A, c, layers[:half], layers[half:], seen, context, **made)
    assert not [name for name in launches if name.startswith("autoregressive")]
