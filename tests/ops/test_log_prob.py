"""log p(x) of a whole flow in one differentiable operation, against the float64 reference, on every kernel."""

from collections.abc import Iterator

import pytest
import torch
from flow_values import derivatives, error, run_op, tensors
from pairs import pairs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from glf_fast import ActNorm, CouplingFlow, SequentialFlow, backends, ops, reference, use_backend
from glf_fast.flow import InvertibleLinear
from glf_fast.flow.coupling_flow import COUPLINGS
from glf_fast.reference import Plu


@pytest.fixture(params=["cpp", "triton"], autouse=True)
def backend(request) -> Iterator[str]:
    """Every test runs on the kernels, and what a kernel leaves unwritten in its results is NaN."""
    if not backends()[request.param].startswith("ready"):
        pytest.skip(backends()[request.param])
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    with use_backend(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def plu(K: int, D: int, actnorm: bool) -> list[Tensor | None]:
    """The arguments of plu_assemble for K random layers."""
    torch.manual_seed(2)
    layers = [InvertibleLinear(D) for _ in range(K)]
    names = ("permutation", "lower", "upper", "log_diag", "sign")
    made = [torch.stack([layer.tensors()[name].detach() for layer in layers]) for name in names]
    made += [0.1 * torch.randn(K, D), torch.randn(K, D)] if actnorm else []
    floats = [t.double().requires_grad_(name != "sign") for name, t in zip([*names[1:], "s", "b"], made[1:])]  # noqa: B905
    return [made[0], *floats, *([] if actnorm else [None, None])]


def of_plu(op, **options):
    """As a function of plu's seven, x, context and layers."""

    def density(*values: Tensor | None) -> tuple[Tensor]:
        seven, x, context, layers = values[:7], values[7], values[8], values[9:]
        half = len(layers) // 2
        return (op(x, Plu(*seven), layers[:half], layers[half:], context, **options),)

    return density


def of_maps(op, **options):
    """As a function of x, A, c, context, log|det A| and layers."""

    def density(x: Tensor, A: Tensor, c: Tensor, context: Tensor | None, logabsdet: Tensor, *layers: Tensor):
        half = len(layers) // 2
        return (op(x, A, c, logabsdet, layers[:half], layers[half:], context, **options),)

    return density


def values_of_plu(batch: int, D: int, C: int, actnorm: bool = True, coupling: str = "affine") -> list[Tensor | None]:
    x, _, _, context, *layers = tensors(batch, 2, D, C, (7, 4), coupling=coupling)
    return [*plu(2, D, actnorm), x, context, *layers]


def values_of_maps(batch: int, D: int, C: int, coupling: str = "affine") -> list[Tensor | None]:
    x, A, c, context, *layers = tensors(batch, 2, D, C, (7, 4), coupling=coupling)
    return [x, A, c, context, torch.tensor(0.7, dtype=torch.float64, requires_grad=True), *layers]


def single(values: list[Tensor | None]) -> list[Tensor | None]:
    """The same in float32."""
    return [
        t.detach().float().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for t in values
    ]


# Batch, D, C: a context, the least of all, no row, more rows than a tile has.
SIZES = [(5, 5, 2), (1, 2, 0), (0, 4, 0), (17, 8, 0)]


@pytest.mark.parametrize(("size", "actnorm", "reversible"), pairs(SIZES, [False, True], [False, True]))
def test_plu_flows_match_the_reference(size: tuple[int, int, int], actnorm: bool, reversible: bool) -> None:
    batch, D, C = size
    values, options = values_of_plu(batch, D, C, actnorm), {"activation": "silu", "log_scale": "atan"}
    want = run_op(of_plu(reference.plu_flow_log_prob, **options), values)
    for given, limit in ((values, 1e-10), (single(values), 1e-3 if reversible else 1e-5)):
        got = run_op(of_plu(ops.plu_flow_log_prob, **options, reversible=reversible), given)
        for mine, truth in zip(got, want, strict=True):
            assert mine.shape == truth.shape and error(mine, truth) <= limit


@pytest.mark.parametrize(("size", "coupling", "reversible"), pairs(SIZES, [*COUPLINGS], [False, True]))
def test_flows_of_any_maps_match_the_reference(size: tuple[int, int, int], coupling: str, reversible: bool) -> None:
    batch, D, C = size
    values, options = (
        values_of_maps(batch, D, C, coupling),
        {"coupling": coupling, "add_first": True, "log_scale": "glow"},
    )
    want = run_op(of_maps(reference.coupling_flow_log_prob, **options), values)
    for given, limit in ((values, 1e-10), (single(values), 1e-3 if reversible else 1e-5)):
        got = run_op(of_maps(ops.coupling_flow_log_prob, **options, reversible=reversible), given)
        for mine, truth in zip(got, want, strict=True):
            assert mine.shape == truth.shape and error(mine, truth) <= limit
    with torch.no_grad():
        (got,) = of_maps(ops.coupling_flow_log_prob, **options)(*values)
    assert error(got, want[0]) < 1e-10


def test_first_and_second_derivatives(backend: str) -> None:
    """Against the reference's, which are PyTorch's own; where that takes no minutes also against differences."""
    torch.use_deterministic_algorithms(False)  # gradgradcheck scatters
    for coupling in COUPLINGS:
        options = {"coupling": coupling, "activation": "tanh"}
        for values, of, name in (
            (values_of_maps(3, 4, 1, coupling), of_maps, "coupling_flow_log_prob"),
            (values_of_plu(3, 4, 1, coupling=coupling), of_plu, "plu_flow_log_prob"),
        ):
            density = of(getattr(ops, name), **options)
            exact = derivatives(of(getattr(reference, name), **options), values)
            for mine, truth in zip(derivatives(density, values), exact, strict=True):
                assert error(mine, truth) < 1e-10, (coupling, name)
            if backend == "cpp":
                assert gradcheck(density, values, fast_mode=True)
                assert gradgradcheck(density, values, fast_mode=True)


@pytest.mark.parametrize("linear", ["plu", "dense", "permutation"])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_log_prob_is_that_of_forward(linear: str, context_dim: int) -> None:
    torch.manual_seed(0)
    flow = CouplingFlow(6, 3, (9,), context_dim, linear=linear)
    x, context = torch.randn(20, 6), torch.randn(20, context_dim) if context_dim else None
    flow(x, context)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))

    def gradients(log_prob: Tensor) -> list[Tensor]:
        return [log_prob, *torch.autograd.grad(log_prob.mean(), list(flow.parameters()))]

    z, logdet = flow(x, context)
    normal = torch.distributions.Normal(0.0, 1.0)
    for a, b in zip(gradients(flow.log_prob(x, context)), gradients(normal.log_prob(z).sum(1) + logdet), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("linear", ["plu", "dense", "permutation"])
def test_the_density_is_part_of_the_kernels_on_every_route(linear: str) -> None:
    """One node of autograd, not a kernel and eight operations on its outputs; PLU layers have no kernel under "triton"."""
    flow = CouplingFlow(6, 3, (9,), linear=linear)
    flow(torch.randn(20, 6))
    assert type(flow.log_prob(torch.randn(5, 6)).grad_fn).__name__ == "_CouplingFlowBackward"


def test_density_behind_an_actnorm(backend: str) -> None:
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    x, s, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 3), (3,), (3,)))
    normal = torch.distributions.Normal(0.0, 1.0)
    want = normal.log_prob((x + b) * s.exp()).sum(1) + s.sum()
    assert error(ops.actnorm_log_prob(x, s, b), want) < 1e-12
    for wanted in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        inputs = tuple(t.detach().requires_grad_(want) for t, want in zip((x, s, b), wanted, strict=True))
        assert gradcheck(ops.actnorm_log_prob, inputs) and gradgradcheck(ops.actnorm_log_prob, inputs)
    jacobian = torch.func.jacrev(ops.actnorm_log_prob)(x, s, b)
    assert error(jacobian.sum(0), torch.autograd.grad(want.sum(), x)[0]) < 1e-12
    assert ops.actnorm_log_prob(x[:0], s, b).shape == (0,)


@pytest.mark.parametrize("shape", [(5,), (3, 2, 4)], ids=["vectors", "images"])
def test_log_prob_of_a_flow_that_ends_in_an_actnorm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    flow = SequentialFlow([InvertibleLinear(shape[0]), ActNorm(shape[0])], shape)
    x = torch.randn(8, *shape)
    flow.log_prob(x)  # starts the ActNorm
    assert flow.layers[1].initialized and flow(x)[0].mean().abs() < 1e-5
    z, logdet = flow(x + 0.5)
    want = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1) + logdet
    found = flow.log_prob(x + 0.5)
    assert error(found, want) < 1e-5
    parameters = list(flow.parameters())
    grads = (torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) for y in (found, want))
    for a, b in zip(*grads, strict=True):
        assert a is b is None or error(a, b) < 1e-4


@pytest.mark.parametrize("linear", ["plu", "dense"])
def test_many_gradients_at_once(linear: str) -> None:
    torch.manual_seed(0)
    flow, x = CouplingFlow(4, 2, (8,), linear=linear), torch.randn(5, 4, requires_grad=True)
    for run in (flow.log_prob, lambda x: flow(x)[0]):
        out = run(x)
        many = torch.randn(3, *out.shape)
        inputs = [x, *flow.parameters()]
        together = torch.autograd.grad(out, inputs, many, is_grads_batched=True, allow_unused=True)
        alone = torch.autograd.grad(run(x), inputs, many[1], allow_unused=True)
        for a, b in zip(together, alone, strict=True):
            assert (a is None) == (b is None) and (a is None or error(a[1], b) < 1e-5)


@pytest.mark.parametrize(
    ("backend", "linear"),
    [
        ("cpp", "plu"),
        ("triton", "permutation"),
        pytest.param("cpp", "permutation", marks=pytest.mark.long),
        pytest.param("triton", "plu", marks=pytest.mark.long),
    ],
    indirect=["backend"],
)
@pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning")  # raised inside inductor
def test_compiled_without_graph_breaks(linear: str, backend: str) -> None:
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)  # inductor would refuse to fill memory
    torch.manual_seed(0)
    flow = CouplingFlow(5, 2, (9,), linear=linear)
    flow(torch.randn(20, 5))
    # aot_eager traces as inductor does, which then compiles C++ for seconds.
    compiler = "inductor" if (backend, linear) == ("cpp", "plu") else "aot_eager"
    compiled = torch.compile(flow.log_prob, fullgraph=True, dynamic=True, backend=compiler)
    for batch in (4, 7):
        x = torch.randn(batch, 5)
        a, b = (torch.autograd.grad(f(x).mean(), list(flow.parameters())) for f in (compiled, flow.log_prob))
        assert all(error(mine, theirs) < 1e-5 for mine, theirs in zip(a, b, strict=True))
    torch.compiler.reset()


def test_under_autocast_as_without_where_the_kernels_keep_full_precision(backend: str) -> None:
    if backend == "triton":
        pytest.skip("the interpreter cannot compute bfloat16 products, and says so")
    torch.manual_seed(0)
    flow, x = CouplingFlow(6, 3, (9,)), torch.randn(20, 6)
    want = flow.log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.log_prob(x), want)


def test_what_does_not_fit_is_refused() -> None:
    values = values_of_plu(3, 4, 0)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, dim\) = \(any, 4\)"):
        of_plu(ops.plu_flow_log_prob)(*values[:7], values[7][:, :3], *values[8:])
    for i, name in enumerate(Plu._fields):
        factor = values[i]
        for wrong in (factor[:, :3], factor.flatten(), factor[None], factor[:0], factor[:1]):
            with pytest.raises(ValueError, match="must have shape"):
                of_plu(ops.plu_flow_log_prob)(*values[:i], wrong, *values[i + 1 :])
        if i < 5:
            with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor"):
                of_plu(ops.plu_flow_log_prob)(*values[:i], None, *values[i + 1 :])
        else:
            with pytest.raises(ValueError, match="give both or neither"):
                of_plu(ops.plu_flow_log_prob)(*values[:i], None, *values[i + 1 :])
    x, A, c, context, logabsdet, *layers = values_of_maps(3, 4, 0)
    with pytest.raises(ValueError, match="logabsdet must have shape"):
        of_maps(ops.coupling_flow_log_prob)(x, A, c, context, logabsdet.expand(3), *layers)
