"""Dropout in the networks of coupling flows: the kernels against the reference, number by number."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from flow_values import DIRECTIONS, compare, derivatives, error, run, tensors
from hypothesis import strategies as st
from random_examples import random_examples
from torch import Tensor
from torch.autograd import gradcheck

from glf_fast import backends, ops, reference, use_backend
from glf_fast.ops.backends import INTERPRETED
from glf_fast.ops.coupling_flow import cpp, cuda, layered, triton
from glf_fast.ops.coupling_flow.call import Call, CallOptions, Maps
from glf_fast.reference import ACTIVATIONS, COUPLINGS

needs_cpp = pytest.mark.skipif(not backends()["cpp"].startswith("ready"), reason=backends()["cpp"])
SEED = torch.tensor(-6_912_345_678_901_234_567)  # the highest bit is a sign
KINDS = {**{name: {"coupling": name} for name in COUPLINGS}, "residual": {"network": "residual"}}


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@needs_cpp
@random_examples(30, 300)
def test_kernels_are_the_float64_reference(data) -> None:
    draw = data.draw
    options = {**draw(st.sampled_from(list(KINDS.values()))), "activation": draw(st.sampled_from(list(ACTIVATIONS)))}
    most = 5 if "network" in options else 4
    hidden = tuple(draw(st.lists(st.integers(1, 70), min_size=1, max_size=most)))
    hidden = hidden[:1] * len(hidden) if "network" in options else hidden
    values = tensors(
        draw(st.sampled_from([1, 2, 5, 9, 33, 130, 300])), draw(st.integers(1, 3)), draw(st.integers(2, 35)),
        draw(st.sampled_from([0, 0, 1, 3])), hidden, **{k: v for k, v in options.items() if k != "activation"},
    )  # fmt: skip
    direction, reversible = draw(st.sampled_from(list(DIRECTIONS))), draw(st.booleans())
    if direction == "inverse":
        values[1] = torch.linalg.inv(values[1].detach()).requires_grad_()
    # 0.9 makes what is left ten times as large: splines so steep that inputs rebuilt from outputs have 6 digits less.
    dropout = draw(st.sampled_from([0.1, 0.5] if reversible else [0.1, 0.5, 0.9]))
    seed = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))])
    torch.set_num_threads(draw(st.sampled_from([1, 2])))
    limit = draw(st.sampled_from([0, cpp.RECORDS_LIMIT]))
    with use_backend("cpp"), mock.patch.object(cpp, "RECORDS_LIMIT", limit):
        compare(values, direction, 1e-6 if reversible else 1e-9, reversible, **options, dropout=dropout, seed=seed)


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "elu"])
def test_float32_and_every_way_of_saving_have_the_same_masks(monkeypatch, kind: str, activation: str) -> None:
    values = tensors(50, 3, 7, 2, (17, 17), torch.float32, **KINDS[kind])
    options = {**KINDS[kind], "activation": activation, "dropout": 0.3, "seed": SEED}
    with use_backend("cpp"):
        compare(values, "forward", 1e-4, **options)
        records = run(ops.coupling_flow, values, **options)
        monkeypatch.setattr(cpp, "RECORDS_LIMIT", 0)
        inputs = run(ops.coupling_flow, values, **options)
        rebuilt = run(ops.coupling_flow, values, **options, reversible=True)
    for a, b, c in zip(records, inputs, rebuilt, strict=True):
        assert error(a, b) < 1e-6 and error(b, c) < 1e-4


@needs_cpp
def test_threads_and_tiles_change_no_bit_of_a_row() -> None:
    values = tensors(700, 2, 20, 0, (64, 64), torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with use_backend("cpp"):
            found.append(run(ops.coupling_flow, values, dropout=0.5, seed=SEED))
    for a, b in zip(
        found[0][:3], found[1][:3], strict=True
    ):  # output, logdet and ∂x; other gradients are sums over rows
        assert torch.equal(a, b)
    with use_backend("cpp"):
        few = [None if t is None else t.detach() for t in values]
        few[0] = few[0][:9]
        out, _ = ops.coupling_flow(*few[:3], few[4:7], few[7:], dropout=0.5, seed=SEED)
    assert error(out, found[0][0][:9]) < 1e-6


@needs_cpp
@pytest.mark.parametrize("reversible", [False, True])
def test_lanes_without_a_row_overflow_only_where_the_last_row_does(reversible: bool) -> None:
    """They repeat that row, and must drop what it drops: u is 8 for each of 16 units that is kept, and e^89 has no float32."""
    x, A, c = torch.randn(9, 2), torch.eye(2)[None], torch.zeros(1, 2)
    weights = [torch.zeros(1, 1, 16), torch.tensor([4.0, 0.1]).expand(1, 16, 2).contiguous()]
    biases = [torch.ones(1, 16), torch.zeros(1, 2)]
    finite = 0
    for seed in range(60):
        values = [x, A, c, None, *weights, *biases]
        values = [None if t is None else t.clone().requires_grad_() for t in values]
        options = {"log_scale": "exp", "dropout": 0.5, "seed": torch.tensor(seed)}
        wanted = run(reference.coupling_flow, values, **options)
        if all(t.isfinite().all() for t in wanted):
            finite += 1
            with use_backend("cpp"):
                found = run(ops.coupling_flow, values, **options, reversible=reversible)
            assert all(t.isfinite().all() for t in found), seed
    assert 10 < finite < 60


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2])
def test_wide_layers(threads: int) -> None:
    """Those whose products all threads compute together: more than 2 MB of weights."""
    torch.set_num_threads(threads)
    for batch in (3, 70):
        values = tensors(batch, 1, 6, 0, (520, 520))
        with use_backend("cpp"):
            compare(values, "forward", 1e-9, dropout=0.2, seed=SEED, activation="tanh")


@needs_cpp
def test_several_tiles_of_rows() -> None:
    """Layers of more than 640 KB, which panels would not keep in the L2 cache, and of less than 2 MB."""
    torch.set_num_threads(2)
    with use_backend("cpp"):
        compare(tensors(300, 1, 6, 2, (300, 300)), "forward", 1e-9, dropout=0.2, seed=SEED, activation="tanh")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("op", [ops.coupling_flow, ops.coupling_flow_inverse])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(op, kind: str, backend: str) -> None:
    if not backends()[backend].startswith("ready"):
        pytest.skip(backends()[backend])
    values = tensors(3, 2, 5, 2, (7, 7), **KINDS[kind])

    def flow(x, A, c, context, *layers):
        half = len(layers) // 2
        options = {**KINDS[kind], "activation": "silu", "dropout": 0.4, "seed": SEED}
        return op(x, A, c, layers[:half], layers[half:], context, **options)

    with use_backend(backend):
        assert gradcheck(flow, values, fast_mode=True)


@needs_cpp
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "additive"])  # its logdet is a constant
def test_second_derivatives_have_the_same_masks(kind: str) -> None:
    values = tensors(3, 2, 5, 2, (7, 7), **KINDS[kind])

    def flow(op):
        def run_op(x, A, c, context, *layers):
            half = len(layers) // 2
            options = {**KINDS[kind], "activation": "tanh", "dropout": 0.4, "seed": SEED}
            return op(x, A, c, layers[:half], layers[half:], context, **options)

        return run_op

    with use_backend("cpp"):
        got = derivatives(flow(ops.coupling_flow), values)
    for mine, truth in zip(got, derivatives(flow(reference.coupling_flow), values), strict=True):
        assert error(mine, truth) < 1e-9


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_densities_have_the_masks_of_their_flow(backend: str) -> None:
    if not backends()[backend].startswith("ready"):
        pytest.skip(backends()[backend])
    x, A, c, context, *layers = tensors(6, 2, 5, 2, (7, 7))
    options = {"dropout": 0.4, "seed": SEED}
    with use_backend(backend):
        z, logdet = ops.coupling_flow(x, A, c, layers[:3], layers[3:], context, **options)
        density = ops.coupling_flow_log_prob(
            x, A, c, torch.tensor(0.5).double(), layers[:3], layers[3:], context, **options
        )
        back, _ = ops.coupling_flow_inverse(z, torch.linalg.inv(A), c, layers[:3], layers[3:], context, **options)
    assert error(density, reference.log_normal(z) + logdet + 0.5) < 1e-12
    assert error(back, x) < 1e-9


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_members_have_seeds_of_their_own(backend: str) -> None:
    if not backends()[backend].startswith("ready"):
        pytest.skip(backends()[backend])
    x, A, c, context, *layers = tensors(10, 4, 5, 2, (7,))
    seed = torch.tensor([2**63 - 1])  # plus 1 it is −2⁶³
    with use_backend(backend):
        both = ops.coupling_flow(x, A, c, layers[:2], layers[2:], context, members=2, dropout=0.4, seed=seed)
        for e in range(2):
            rows, steps = slice(5 * e, 5 * e + 5), slice(2 * e, 2 * e + 2)
            own = [t[steps] for t in layers]
            one = ops.coupling_flow(
                x[rows], A[steps], c[steps], own[:2], own[2:], context[rows], dropout=0.4, seed=seed + e
            )
            for a, b in zip(both, one, strict=True):
                assert error(a[rows], b) < 1e-12
        grads = torch.autograd.grad(both[0].square().sum(), [x, *layers])
    want = ops.coupling_flow(x[:5], A[:2], c[:2], [t[:2] for t in layers[:2]], [t[:2] for t in layers[2:]], context[:5],
                             dropout=0.4, seed=seed)[0].square().sum()  # fmt: skip
    for a, b in zip(grads[1:], torch.autograd.grad(want, layers), strict=True):
        assert error(a[:2], b[:2]) < 1e-9


def test_no_dropout_is_the_flow_without() -> None:
    x, A, c, context, *layers = tensors(6, 2, 5, 2, (7, 7))
    plain = ops.coupling_flow(x, A, c, layers[:3], layers[3:], context)
    for a, b in zip(
        plain, ops.coupling_flow(x, A, c, layers[:3], layers[3:], context, dropout=0, seed=SEED), strict=True
    ):
        assert torch.equal(a, b)


def test_vmap_keeps_the_seed() -> None:
    x, A, c, _, *layers = (None if t is None else t.detach() for t in tensors(6, 2, 5, 0, (7,)))
    flow = lambda x: ops.coupling_flow(x, A, c, layers[:2], layers[2:], dropout=0.4, seed=SEED)[0]  # noqa: E731
    with use_backend("reference"):
        batches = torch.func.vmap(flow)(x.view(2, 3, 5))
        assert torch.equal(batches[1], flow(x[3:]))


@needs_cpp
def test_compiled_flows_read_the_seed_of_each_call() -> None:
    x, A, c, _, *layers = (None if t is None else t.detach() for t in tensors(6, 2, 5, 0, (7,)))
    flow = lambda seed: ops.coupling_flow(x, A, c, layers[:2], layers[2:], dropout=0.4, seed=seed)[0]  # noqa: E731
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    with use_backend("cpp"):
        first, second = (compiled(torch.tensor(seed)) for seed in (1, 2))
        assert torch.equal(first, flow(torch.tensor(1))) and torch.equal(second, flow(torch.tensor(2)))
        assert not torch.equal(first, second)
        library = torch.ops.glf_fast
        code = (0, 0, 0, 0.0, 0, 2.0, False, [], False)
        torch.library.opcheck(
            library.cpu_coupling_flow.default,
            (x, A, c, layers[:2], layers[2:], None, *code, False, 1, 5, 1, False, 0.4, SEED),
        )


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dropout": 1.0, "seed": SEED}, ValueError, "dropout must be a number of at least 0, and below 1; got 1.0"),
        ({"dropout": -0.1, "seed": SEED}, ValueError, "dropout must be"),
        ({"dropout": float("nan"), "seed": SEED}, ValueError, "dropout must be"),
        ({"dropout": "0.1", "seed": SEED}, ValueError, "dropout must be"),
        ({"dropout": 0.1}, TypeError, "seed must be a tensor of int64 where dropout is above 0; got None"),
        ({"dropout": 0.1, "seed": 3}, TypeError, "seed must be a tensor of int64"),
        ({"dropout": 0.1, "seed": SEED.int()}, TypeError, r"got a tensor of torch.int32"),
        ({"dropout": 0.1, "seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"one element; got shape \(2,\)"),
        ({"dropout": 0.1, "seed": SEED.to("meta")}, ValueError, "seed must be on cpu"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(options, kind: type[Exception], message: str, grad: bool) -> None:
    x, A, c, context, *layers = tensors(6, 2, 5, 2, (7,))
    with torch.set_grad_enabled(grad), pytest.raises(kind, match=message):
        ops.coupling_flow(x, A, c, layers[:2], layers[2:], context, **options)
    with torch.set_grad_enabled(grad), pytest.raises(kind, match=message):
        ops.coupling_flow_log_prob(x, A, c, x.new_zeros(()), layers[:2], layers[2:], context, **options)


def call(coupling: str = "affine", **changes) -> Call:
    x, A, c, context, *layers = (
        None if t is None else t.detach() for t in tensors(6, 2, 5, 2, (7, 7), coupling=coupling)
    )
    options = CallOptions(coupling, "mlp", "relu", 0.0, "tanh", None, False, None, *[False] * 4, 2.0)
    options = options._replace(dropout=0.4, **changes)
    return Call(x, context, Maps(A, c, None), layers[:3], layers[3:], options, SEED)


def test_kernels_of_whole_flows_on_gpus_refuse() -> None:
    assert triton.refuses(call()) == cuda.refuses(call()) == "dropout"
    assert not layered.refuses(call()) and not cpp.refuses(call())


@pytest.mark.skipif(not INTERPRETED, reason="the elementwise kernels are interpreted where TRITON_INTERPRET=1")
@pytest.mark.parametrize("coupling", ["affine", "separate", "additive"])
def test_the_way_layer_by_layer_has_the_masks_of_the_reference(coupling: str) -> None:
    given = call(coupling)
    x, context, (A, c, _), weights, biases, _, _ = given
    want: tuple[Tensor, ...] = reference.coupling_flow(
        x, A, c, weights, biases, context, coupling=coupling, dropout=0.4, seed=SEED
    )
    for a, b in zip(layered.run(given), want, strict=True):
        assert error(a, b) < 1e-9
