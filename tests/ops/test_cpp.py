"""The C++ kernels against the float64 reference, over the whole table of options."""

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import forked
import pytest
import torch
from flow_values import DIRECTIONS, check_bayesflows_scale, compare, error, run, tensors
from hypothesis import assume
from hypothesis import strategies as st
from random_examples import random_examples
from torch import Tensor
from torch.autograd import gradcheck

from glf_fast import CouplingFlow, Spline, backends, ops, reference, use_backend
from glf_fast.flow.coupling_flow import COUPLINGS
from glf_fast.ops.coupling_flow import cpp
from glf_fast.ops.coupling_flow.call import Call, CallOptions, Maps
from glf_fast.reference import ACTIVATIONS, LOG_SCALES, NETWORKS

pytestmark = pytest.mark.skipif(not backends()["cpp"].startswith("ready"), reason=backends()["cpp"])


@pytest.fixture(autouse=True)
def on_cpp() -> Iterator[None]:
    """Every test runs on the kernels."""
    threads = torch.get_num_threads()
    with use_backend("cpp"):
        yield
    torch.set_num_threads(threads)


def test_what_a_kernel_leaves_unwritten_is_nan() -> None:
    """So that all other tests see it: tests/conftest.py asks for it."""
    x, A, c, context, *layers = [t.detach() for t in tensors(3, 2, 5, 2, (7,), torch.float32)]
    options = CallOptions("affine", "mlp", "relu", 0.0, "tanh", None, False, None, *[False] * 4, 2.0)
    _, _, saved = cpp.forward(Call(x, context, Maps(A, c, None), layers[:2], layers[2:], options), True)
    assert saved.isnan().any()  # between the fields of a record, or behind the panels'


@random_examples(50, 500)
def test_everything_matches_the_float64_reference(data) -> None:
    draw = data.draw
    K, D = draw(st.integers(1, 3)), draw(st.integers(2, 35))
    C = draw(st.sampled_from([0, 0, 1, 3, 16]))
    network = draw(st.sampled_from(list(NETWORKS)))
    if network == "residual":
        hidden = (draw(st.integers(1, 70)),) * draw(st.integers(1, 5))
    else:
        hidden = tuple(draw(st.lists(st.integers(1, 70), min_size=0, max_size=8)))
    batch = draw(st.sampled_from([0, 1, 2, 5, 8, 9, 16, 33, 130, 300]))
    options = {
        "coupling": draw(st.sampled_from([name for name in COUPLINGS if network == "mlp" or name != "separate"])),
        "network": network,
        "activation": draw(st.sampled_from(list(ACTIVATIONS))),
        "log_scale": draw(st.sampled_from(list(LOG_SCALES))),
        "add_first": draw(st.booleans()),
    }
    if ACTIVATIONS[options["activation"]] is not None:
        options["activation_constant"] = draw(st.sampled_from([None, 0.2, 1.7]))
    if LOG_SCALES[options["log_scale"]] is not None:
        options["log_scale_constant"] = draw(st.sampled_from([None, 0.05, 0.7]))
    inverse, reversible = draw(st.booleans()), draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    torch.set_num_threads(draw(st.sampled_from([1, 2])))
    exact = tensors(batch, K, D, C, hidden, coupling=options["coupling"], network=network)
    if inverse:
        exact[1] = torch.linalg.inv(exact[1].detach()).requires_grad_()
    given_ = [None if t is None else t.detach().to(dtype).requires_grad_() for t in exact]
    if draw(st.booleans()):  # strided input
        given_[0] = given_[0].detach().repeat(1, 2)[:, ::2][:, :D].copy_(given_[0]).requires_grad_()
        given_ = [
            None if t is None else t.detach().mT.contiguous().mT.requires_grad_() if t.ndim > 1 else t for t in given_
        ]
    name = "coupling_flow_inverse" if inverse else "coupling_flow"
    # Small flows save all they compute; with a limit of 0 only the steps' inputs, as large ones do.
    limit = draw(st.sampled_from([0, cpp.RECORDS_LIMIT]))
    want = run(getattr(reference, name), exact, **options)
    # An unbounded scale makes 10¹¹ of 1: rebuilt from that in float32, no digit of the 1 is left.
    assume(not reversible or want[0].numel() == 0 or want[0].abs().max() < 1e4)
    with mock.patch.object(cpp, "RECORDS_LIMIT", limit):
        got = run(getattr(ops, name), given_, **options, reversible=reversible)
    plain = run(getattr(reference, name), given_, **options)
    for mine, theirs, truth in zip(got, plain, want, strict=True):
        assert mine.dtype == dtype and mine.shape == truth.shape
        # As good as plain PyTorch in this precision, up to what another order of summation may change. Rebuilding
        # inputs from outputs loses what the condition of the steps loses.
        floor = (1e-3 if reversible else 2e-5) if dtype == torch.float32 else 1e-10
        assert error(mine, truth) <= max(4 * error(theirs, truth), floor)


# Every coupling with an MLP, and a residual network of two blocks.
KINDS = {**{name: {"coupling": name} for name in COUPLINGS}, "residual": {"network": "residual"}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("op", [ops.coupling_flow, ops.coupling_flow_inverse])
def test_gradcheck(op, reversible: bool, kind: str) -> None:
    values = tensors(3, 2, 5, 2, (7, 7), **KINDS[kind])

    def flow(x, A, c, context, *layers):
        half = len(layers) // 2
        options = {**KINDS[kind], "activation": "silu", "reversible": reversible}
        return op(x, A, c, layers[:half], layers[half:], context, **options)

    assert gradcheck(flow, values, fast_mode=True)


def test_opcheck() -> None:
    x, A, c, context, *layers = [t.detach() for t in tensors(4, 2, 5, 2, (7,), torch.float32)]
    weights, biases = layers[:2], layers[2:]
    library = torch.ops.glf_fast
    code, logabsdet = (0, 0, 0, 0.0, 0, 2.0, False, [], False), torch.randn(2)
    for save, record, members in ((0, 0, 1), (1, 5, 1), (1, 5, 2)):
        forward = (x, A, c, weights, biases, context, *code, False, save, record, members, False, 0.0, None, logabsdet)
        torch.library.opcheck(library.cpu_coupling_flow.default, forward)
    for members in (1, 2):
        out, logdet, saved = library.cpu_coupling_flow(x, A, c, weights, biases, context, *code, False, 1, 5, members)
        torch.library.opcheck(
            library.cpu_coupling_flow_backward.default,
            (
                out,
                logdet,
                out,
                saved,
                A,
                None,
                c,
                weights,
                biases,
                context,
                *code,
                1,
                True,
                members,
                members == 1,
                True,
            ),
        )
    formula = (0, 2.0, False, False)
    torch.library.opcheck(library.cpu_affine_coupling.default, (x, x, x, *formula))
    torch.library.opcheck(library.cpu_affine_coupling_backward.default, (x, logdet, x, x, x, *formula))
    options, parameters = Spline(bins=4).prepared().numbers(), torch.randn(4, 5, 11)
    torch.library.opcheck(library.cpu_spline.default, (x, parameters, options, False))
    torch.library.opcheck(library.cpu_spline_backward.default, (x, logdet, x, parameters, options, True))


@pytest.mark.parametrize(
    ("activation", "constant"),
    [("leaky_relu", 0.2), ("elu", 0.5), ("hardswish", None), ("softplus", None), ("mish", None)],
)
def test_activations_have_the_digits_of_float32(activation: str, constant: float | None) -> None:
    """Also where the function, or its slope, is small, and where e^|x| is no number."""
    small = torch.logspace(-30, 1.9, 400)
    x = torch.cat([small, -small, torch.linspace(-60, 120, 400), torch.tensor([19.9, 3.0, -3.0, 0.0, 1e5])])

    def made(module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """a(x) and a'(x), of a step that adds a(x) to 0."""
        rows = torch.stack([x, torch.zeros_like(x)], 1).to(dtype).requires_grad_()
        one, zero = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
        options = {"coupling": "additive", "activation": activation, "activation_constant": constant}
        y = module.coupling_flow(
            rows, torch.eye(2, dtype=dtype)[None], torch.zeros(1, 2, dtype=dtype), [one, one], [zero, zero], **options
        )[0][:, 1]
        return y.detach(), torch.autograd.grad(y.sum(), rows)[0][:, 0]

    exact = made(reference, torch.float64)
    for i, (mine, plain, truth) in enumerate(
        zip(made(ops, torch.float32), made(reference, torch.float32), exact, strict=True)
    ):
        errors = [(found.double() - truth).abs() for found in (mine, plain)]
        # The slope of elu, a(x) + α, has those of α.
        floor = 1e-7 if activation == "elu" and i else 1e-37
        assert (errors[0] <= 2 * errors[1] + 1e-6 * truth.abs() + floor).all(), x[(errors[0] / truth.abs()).argmax()]
    for mine, truth in zip(made(ops, torch.float64), exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_pass_through_as_in_plain_pytorch(activation: str, log_scale: str, bad: float) -> None:
    x, A, c, _, *layers = tensors(20, 1, 5, 0, (9,), torch.float32)
    x = x.detach()
    x[3, 1] = bad
    results = [
        op(x, A, c, layers[:2], layers[2:], activation=activation, log_scale=log_scale)
        for op in (ops.coupling_flow, reference.coupling_flow)
    ]
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine.isfinite().flatten(1).all(1) if mine.ndim > 1 else mine.isfinite(),
                           theirs.isfinite().flatten(1).all(1) if theirs.ndim > 1 else theirs.isfinite())  # fmt: skip
        assert mine.isfinite().sum() >= 19 * mine[0].numel()


def test_bayesflows_scale_of_large_numbers() -> None:
    check_bayesflows_scale()
    # The kernels stop at a sixteenth of the largest number, where nothing overflows: 1 % of a scale of 88.
    for u in (torch.tensor([[1e38], [3e38]]), torch.tensor([[1e308]], dtype=torch.float64)):
        u.requires_grad_()
        one, zero = torch.ones_like(u), torch.zeros_like(u)
        w, logdet = ops.affine_coupling(one, u, zero, log_scale="bayesflow")
        torch.testing.assert_close(
            w, reference.affine_coupling(one, u, zero, log_scale="bayesflow")[0], rtol=0.05, atol=0
        )
        assert torch.autograd.grad(logdet.sum(), u)[0].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_results_repeat_exactly(threads: int) -> None:
    torch.set_num_threads(threads)
    values = tensors(300, 3, 20, 0, (64, 64), torch.float32)
    for a, b in zip(run(ops.coupling_flow, values), run(ops.coupling_flow, values), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["gelu", "elu"])
def test_every_way_of_saving_gives_the_same_gradients(monkeypatch, kind: str, activation: str) -> None:
    values = tensors(50, 3, 7, 2, (16, 16), torch.float32, **KINDS[kind])
    options = {**KINDS[kind], "activation": activation}
    records = run(ops.coupling_flow, values, **options)
    monkeypatch.setattr(cpp, "RECORDS_LIMIT", 0)
    inputs = run(ops.coupling_flow, values, **options)
    for a, b in zip(records, inputs, strict=True):
        assert error(a, b) < 1e-6
    for a, b in zip(run(ops.coupling_flow, values, **options, reversible=True), inputs, strict=True):
        assert error(a, b) < 1e-4


def test_reversible_memory_does_not_grow_with_the_steps(monkeypatch) -> None:
    monkeypatch.setattr(cpp, "RECORDS_LIMIT", 0)

    def saved(K: int, reversible: bool) -> int:
        sizes: list[int] = []
        values = tensors(64, K, 6, 0, (8,), torch.float32)
        parameters = {t.data_ptr() for t in values if t is not None}
        x, A, c, _, *layers = values
        pack = lambda t: sizes.append(0 if t.data_ptr() in parameters else t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ops.coupling_flow(x, A, c, layers[:2], layers[2:], reversible=reversible)
        return sum(sizes)

    assert saved(16, True) == saved(2, True)
    assert saved(16, True) == 64 * 6 and saved(16, False) == 16 * 64 * 6


def test_lesser_instruction_sets_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import torch, glf_fast
torch.manual_seed(0)
flow = glf_fast.CouplingFlow(20, 2, (40, 40))
x = torch.randn(50, 20)
flow(x)
with torch.no_grad():
    for p in flow.parameters():
        p.add_(0.1 * torch.randn_like(p))
W = torch.randn(21, 9, 9) + 3 * torch.eye(9)
torch.save([(*flow(x), *glf_fast.ops.slogdet_inverse(W)[:3]), glf_fast.backends()], PATH)
"""
    monkeypatch.setenv("GLF_FAST_BACKEND", "cpp")
    outputs = {}
    for isa in ("", "avx2", "generic"):
        monkeypatch.setenv("GLF_FAST_ISA", isa)
        done = forked.fresh(code.replace("PATH", repr(str(tmp_path / "results"))))
        assert done.returncode == 0, done.stderr
        outputs[isa] = torch.load(tmp_path / "results")
    for isa, said in (("avx2", "AVX2"), ("generic", "basic")):
        for a, b in zip(outputs[""][0], outputs[isa][0], strict=True):
            assert error(a, b) < 1e-5
        assert said in outputs[isa][1]["cpp"] or os.uname().machine != "x86_64"


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLF_FAST_ISA", "avx1024")
    done = forked.fresh("import glf_fast")
    assert done.returncode == 1
    assert "$GLF_FAST_ISA must be one of '', 'avx512', 'avx2', 'generic'; got 'avx1024'" in done.stderr


def test_a_flow_learns_the_same_as_with_the_reference() -> None:
    g = torch.Generator().manual_seed(0)
    data = torch.randn(4, 128, 8, generator=g)
    data[..., 1] = data[..., 0] ** 2 + 0.1 * data[..., 1]

    def curve(backend: str, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        flow = CouplingFlow(8, 4, (32, 32)).to(dtype)
        optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
        losses = []
        with use_backend(backend):
            for i in range(100):
                loss = -flow.log_prob(data[i % 4].to(dtype)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return torch.tensor(losses)

    exact, plain, cpp = (
        curve("reference", torch.float64),
        curve("reference", torch.float32),
        curve("cpp", torch.float32),
    )
    assert exact[-1] < exact[0] - 1
    # Adam divides by tiny second moments and so amplifies rounding: the measure is what float32 does to plain PyTorch.
    noise = (plain - exact).abs().max()
    assert noise < 0.01 and (cpp - exact).abs().max() <= 3 * noise


def test_evaluation_sees_every_change_of_the_parameters() -> None:
    torch.manual_seed(0)
    flow = CouplingFlow(6, 2, (8,))
    x = torch.randn(40, 6)
    flow(x)
    flow.eval()
    with torch.no_grad():
        before = flow(x)[0]
        assert torch.equal(flow(x)[0], before)
        flow.linear_upper.add_(0.5)  # in place
        changed = flow(x)[0]
        assert not torch.equal(changed, before)
        flow.actnorm_bias = torch.nn.Parameter(flow.actnorm_bias + 1)  # replaced
        assert not torch.equal(flow(x)[0], changed)
        z, logdet = flow(x)
        back, logdet_back = flow.inverse(z)
    assert error(back, x) < 1e-5 and error(logdet_back, -logdet) < 1e-4


def test_backend_choice() -> None:
    x = torch.zeros(2, 3)
    with (
        pytest.raises(ValueError, match=r"backend must be one of 'auto', 'reference', .*'cpp'.*; got 'fast'"),
        use_backend("fast"),
    ):
        pass
    half = x.bfloat16()
    assert ops.affine_coupling(half, half, half)[0].dtype == torch.float32


def test_arguments_that_do_not_belong_together_are_refused() -> None:
    x, A, c, _, *layers = tensors(3, 2, 5, 0, (7,))
    weights, biases = layers[:2], layers[2:]
    with pytest.raises(ValueError, match="A holds no step"):
        ops.coupling_flow(x, A[:0], c[:0], [w[:0] for w in weights], [b[:0] for b in biases])
    with pytest.raises(ValueError, match="a weight is on meta but the rest is on cpu"):
        ops.coupling_flow(x, A, c, [w.to("meta") for w in weights], biases)
    with pytest.raises(TypeError, match=r"c is torch\.float32 but the rest is torch\.float64"):
        ops.coupling_flow(x, A, c.float(), weights, biases)
    with pytest.raises(ValueError, match="u is on meta but the rest is on cpu"):
        ops.affine_coupling(x, x.to("meta"), x)


def test_layers_that_make_no_residual_network_are_refused() -> None:
    x, A, c, context, *layers = tensors(3, 2, 5, 2, (7, 7), network="residual")
    half = len(layers) // 2
    weights, biases = layers[:half], layers[half:]
    options = {"network": "residual"}
    with pytest.raises(ValueError, match="must be two and 3 for each block; got 7"):
        ops.coupling_flow(x, A, c, weights[:-1], biases[:-1], context, **options)
    for i, (wrong, shape) in enumerate(zip((5, 6, 6), ((7, 7), (7, 7), (2, 7)), strict=True)):
        bad = [*weights[: i + 1], torch.zeros(2, wrong, 7).double(), *weights[i + 2 :]]
        for grad in (True, False):  # with and without the path that checks in C++ first
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(
                    ValueError, match=rf"weights\[{i + 1}\] must have shape .* = \(2, {shape[0]}, {shape[1]}\)"
                ),
            ):
                ops.coupling_flow(x, A, c, bad, biases, context, **options)
    with pytest.raises(ValueError, match="coupling='separate' has two MLPs"):
        ops.coupling_flow(x, A, c, weights, biases, context, coupling="separate", **options)


def test_the_operations_themselves_refuse_shapes_that_do_not_fit() -> None:
    x, A, c, _, *layers = (t if t is None else t.detach() for t in tensors(3, 2, 5, 0, (7,)))
    code = (0, 0, 0, 0.0, 0, 2.0, False, [], False, False, 0, 0)

    def call(**changes: Tensor) -> None:
        given = {"x": x, "A": A, "c": c, "w": layers[1], "b": layers[2], **changes}
        weights, biases = [layers[0], given["w"]], [given["b"], layers[3]]
        torch.ops.glf_fast.cpu_coupling_flow.default(given["x"], given["A"], given["c"], weights, biases, None, *code)

    call()
    for name, bad in (("x", x[:, :4]), ("c", c[:, :3]), ("b", layers[2][:, :3]), ("w", layers[1][..., :2])):
        with pytest.raises(RuntimeError, match=r"do not|must end in"):
            call(**{name: bad.contiguous()})
    with pytest.raises(RuntimeError, match="one shape"):
        torch.ops.glf_fast.cpu_affine_coupling.default(x, x[:2], x, 0, 2.0, False, False)


def test_the_output_may_be_changed_in_place() -> None:
    x, A, c, _, *layers = tensors(3, 2, 5, 0, (7,))

    def gradient(op) -> Tensor:
        z, logdet = op(x, A, c, layers[:2], layers[2:])
        return torch.autograd.grad((z.mul_(2) + logdet[:, None]).sum(), x)[0]

    torch.testing.assert_close(gradient(ops.coupling_flow), gradient(reference.coupling_flow))


# Up to 6 rows; those of a part of a tile, whose products two threads compute together; and rows for each thread.
@pytest.mark.parametrize(("kind", "rows"), [*((kind, 75) for kind in KINDS), ("affine", 3), ("additive", 1100)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layers_that_no_thread_keeps_in_its_cache(kind: str, rows: int, direction: str) -> None:
    hidden = (530, 530) if kind == "residual" else (530, 500)  # 2 MB in float64
    values = tensors(rows, 1 + (rows == 75), 7, 2, hidden, **KINDS[kind])
    torch.set_num_threads(2)
    compare(values, direction, 1e-9, **KINDS[kind])
    if rows > 1000:
        return
    op = getattr(ops, DIRECTIONS[direction])
    of_two = run(op, values, **KINDS[kind])
    torch.set_num_threads(1)
    for a, b in zip(run(op, values, **KINDS[kind]), of_two, strict=True):
        assert torch.equal(a, b)


# Layers that are too large for panels and small enough for one thread: tiles of rows, several for each thread.
@pytest.mark.parametrize("kind", ["affine", "spline", "residual"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_several_tiles_of_rows(kind: str, direction: str) -> None:
    torch.set_num_threads(2)
    compare(tensors(300, 1, 34, 2, (300, 300), **KINDS[kind]), direction, 1e-9, **KINDS[kind])


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize(("direction", "row_scales"), [("forward", False), ("forward", True), ("inverse", False)])
def test_maps_that_permute_and_scale_are_gathered(direction: str, reversible: bool, row_scales: bool) -> None:
    """The first is one; a cyclic shift with one number more is not, nor is a matrix with two numbers in a column."""
    rows, K, D = 37, 3, 40
    values = tensors(rows, K, D, 2, (9,))
    A = torch.zeros(K, D, D, dtype=torch.float64)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(0))
    A[:, torch.arange(D), order] = torch.linspace(-2, 2, D, dtype=torch.float64).add(0.3)
    A[1, 20, 0 if order[20] else 1] = 0.5
    A[2] = A[2].roll(1, 0)
    values[1] = A.requires_grad_()
    scales = torch.ones(K, D, 1, dtype=torch.float64, requires_grad=True)

    def gradients(space, **options) -> tuple[Tensor, ...]:
        def scaled(x, *others):
            A = scales * values[1].detach() if row_scales else values[1]
            A = A.mT if direction == "inverse" else A  # whose columns are scaled, as an inverse's are
            return getattr(space, DIRECTIONS[direction])(x, A, *others, **options)

        x, _, c, context, *layers = values
        out, logdet = scaled(x, c, layers[:2], layers[2:], context)
        inputs = [x, scales if row_scales else values[1], c, context, *layers]
        return out, logdet, *torch.autograd.grad((out.square().sum() + (logdet * torch.arange(rows)).sum()), inputs)

    got = gradients(ops, reversible=reversible, **({"row_scales": True} if row_scales else {}))
    for mine, truth in zip(got, gradients(reference), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)


def test_fixed_matrices_have_no_gradients() -> None:
    """Their products are left out, whatever they are; all other gradients stay as they are."""
    x, A, c, context, *layers = tensors(20, 2, 6, 1, (8,))
    weights, biases = layers[:2], layers[2:]
    z, _ = ops.coupling_flow(x, A.detach(), c, weights, biases, context)
    got = torch.autograd.grad(z.square().sum(), [x, c, context, *layers])
    z, _ = reference.coupling_flow(x, A, c, weights, biases, context)
    for mine, truth in zip(got, torch.autograd.grad(z.square().sum(), [x, c, context, *layers]), strict=True):
        torch.testing.assert_close(mine, truth)

    x, A, c, context, *layers = [t.detach() for t in (x, A, c, context, *layers)]
    options = CallOptions("affine", "mlp", "relu", 0.0, "tanh", None, False, None, *[False] * 4, 2.0)
    call = Call(x, context, Maps(A, c, None), layers[:2], layers[2:], options)
    out, logdet, saved = cpp.forward(call, True)
    all_, others = (cpp.backward(call, x, saved, None, out, logdet, True, True, of) for of in (True, False))
    assert all_[2].shape == A.shape and others[2].numel() == 0
    for mine, truth in zip(others[:2] + others[3:], all_[:2] + all_[3:], strict=True):
        assert torch.equal(mine, truth)


def test_wide_layers_are_kept_where_others_are_computed_again(monkeypatch) -> None:
    def saved(hidden: int) -> int:
        sizes: list[int] = []
        x, A, c, _, *layers = tensors(64, 2, 6, 0, (hidden,), torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            ops.coupling_flow(x, A, c, layers[:2], layers[2:])
        return max(sizes)

    monkeypatch.setattr(cpp, "RECORDS_LIMIT", 1 << 17)  # below what 256 units are; eight times as much holds 512
    assert saved(512) > 2 * 64 * 512 > 2 * saved(256)
