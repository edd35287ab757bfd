"""Whole training steps of small flows by CUDA kernels, without a GPU: on the host, against torch.optim.AdamW in float64."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from exact_flows import error
from host_launches import launcher
from nvrtc import check_that_nvrtc_compiles
from torch import Tensor, nn

from glf_fast import CouplingFlow, reference, use_backend
from glf_fast.fitting import dataset as fitting_rows
from glf_fast.fitting.graphed import CapturedStep, DeviceStep
from glf_fast.fitting.small_step import small_step
from glf_fast.fitting.steps import Steps, adamw
from glf_fast.ops.coupling_flow import cupy as cupy_flow
from glf_fast.ops.coupling_flow import small, training_step
from glf_fast.ops.coupling_flow.small import BF16, FLOAT32, TF32, FlowShape, Options
from glf_fast.ops.coupling_flow.training_step import AdamW, Progress, Rows, SmallFlowStep, Trained
from glf_fast.ops.linear import cupy as cupy_linear
from glf_fast.ops.row_products import cupy as cupy_products
from glf_fast.reference import Plu, prepared_constant

ROWS, STEPS, RATE, DECAY, EPSILON, BETAS = 50, 4, 0.02, 0.1, 1e-3, (0.8, 0.95)
SIZES = {
    "small": (20, 3, (64, 64), 0),
    "context": (7, 2, (50, 33), 16),
    "deep": (31, 2, (40, 64, 17), 3),
    "shallow": (2, 1, (5,), 1),
}


@pytest.fixture(autouse=True)
def launches(host_flow, host_kernels, monkeypatch) -> Iterator[list[str]]:
    """Names of kernels that were launched, on the host. What is not written is NaN."""
    seen: list[str] = []

    def seen_by(library):
        run = launcher(library, lambda threads, shared: None)

        def launch(name: str, *arguments) -> None:
            seen.append(name.removeprefix("glf::device::").partition("<")[0])
            run(name, *arguments)

        return launch

    monkeypatch.setattr(cupy_linear, "launch", seen_by(host_flow))
    monkeypatch.setattr(cupy_products, "launch", seen_by(host_kernels))
    monkeypatch.setattr(cupy_linear, "most_shared", lambda device: 227 << 10)
    monkeypatch.setattr(cupy_linear, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(small, "CUPY", True)
    monkeypatch.setattr(training_step, "CUPY", True)
    library = torch.library.Library("glf_fast", "IMPL")
    library.impl("row_products", cupy_products.row_products, "CPU")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield seen
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    library._destroy()


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def backwards(host_flow, request) -> Iterator[None]:
    """Threads and lanes in either order."""
    host_flow.set_backwards(request.param)
    yield
    host_flow.set_backwards(False)


def made(size: str, **options) -> CouplingFlow:
    """A flow whose parameters and ActNorms are off their start."""
    dim, steps, hidden, context = SIZES[size]
    torch.manual_seed(1)
    flow = CouplingFlow(dim, steps, hidden, context, **options)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
        flow.actnorm_initialized.fill_(1)
    flow._started = True
    return flow.train()


def rows_of(flow: CouplingFlow, weighted: bool) -> Rows:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, flow.config["dim"], generator=g)
    context = torch.randn(ROWS, flow.context_dim, generator=g) if flow.context_dim else None
    return Rows(x, context, torch.rand(ROWS, generator=g) if weighted else None)


def parameters_of(flow: CouplingFlow) -> list[Tensor]:
    linear, actnorm = flow._map_tensors()
    names = ("lower", "upper", "log_diag")
    return [
        *(linear[name] for name in names),
        *(t for t in actnorm if t is not None),
        *flow.mlp_weights,
        *flow.mlp_biases,
    ]


def step_of(
    flow: CouplingFlow, rows: Rows, order: Tensor, rates: list[float], clip: float, precisions: tuple[int, int],
    several: bool = True,
) -> tuple[SmallFlowStep, list[Trained], Progress]:  # fmt: skip
    config = flow.config
    shape = FlowShape(config["steps"], config["dim"], config["context_dim"], config["hidden"], *precisions)
    constant = prepared_constant(config["log_scale"], config["log_scale_constant"])
    options = Options(config["activation"], config["log_scale"], constant, config["add_first"], False, True)
    linear, (log_scale, bias) = flow._map_tensors()
    trained = [
        Trained(p.detach(), torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())) for p in parameters_of(flow)
    ]
    progress = Progress(order, torch.tensor(rates), torch.full((len(rates),), torch.nan), None)
    if several:
        progress = progress._replace(made=torch.zeros(1, dtype=torch.int64))
    plu = Plu(**linear, log_scale=log_scale, bias=bias)
    return SmallFlowStep(
        shape, options, plu, trained, rows, progress, AdamW(BETAS, EPSILON, DECAY, clip)
    ), trained, progress  # fmt: skip


def exactly(flow: CouplingFlow, rows: Rows, order: Tensor, rates: list[float], clip: float) -> tuple[list[float], list]:
    """The same in float64 by plain PyTorch: losses, and values and moments of each parameter."""
    flow = copy.deepcopy(flow).double()
    optimizer = torch.optim.AdamW(flow.parameters(), RATE, BETAS, EPSILON, DECAY)
    x, context, weights = (None if t is None else t.double() for t in rows)
    losses = []
    for index, rate in zip(order, rates, strict=True):
        with use_backend("reference"):
            log_prob = flow.log_prob(x[index], None if context is None else context[index])
        loss = -(log_prob if weights is None else weights[index] * log_prob).mean()
        optimizer.zero_grad()
        loss.backward()
        if clip < math.inf:
            nn.utils.clip_grad_norm_(flow.parameters(), clip)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    states = [optimizer.state[p] for p in parameters_of(flow)]
    values = [p.detach() for p in parameters_of(flow)]
    return losses, [(v, s["exp_avg"], s["exp_avg_sq"]) for v, s in zip(values, states, strict=True)]


ORDER = torch.stack([torch.randperm(ROWS, generator=torch.Generator().manual_seed(k))[:37] for k in range(STEPS)])
RATES = [RATE / (1 + k) for k in range(STEPS)]


def worst(trained: list[Trained], exact: list) -> float:
    errors = [error(a, b) for t, them in zip(trained, exact, strict=True) for a, b in zip(t[:3], them, strict=True)]
    return max(errors)


@pytest.mark.parametrize("size", SIZES)
def test_steps_are_those_of_adamw(size: str, backwards, launches) -> None:
    """Weighted rows, clipped, ActNorms; five launches a step, and the parameters are packed for the next one."""
    flow = made(size, activation="silu")
    rows = rows_of(flow, weighted=True)
    losses, exact = exactly(flow, rows, ORDER, RATES, 0.3)
    step, trained, progress = step_of(flow, rows, ORDER, RATES, 0.3, (FLOAT32, FLOAT32))
    step.prepare()
    launches.clear()
    for _ in range(STEPS):
        step.run()
    assert launches == STEPS * [
        "flow_batch_kernel", "flow_gradient_kernel", "row_products_kernel", "flow_gradients_kernel", "flow_update_kernel",
    ]  # fmt: skip
    assert progress.losses.tolist() == pytest.approx(losses, rel=1e-5)
    assert int(progress.made) == STEPS and all(t.steps == STEPS for t in trained)
    assert worst(trained, exact) < 2e-5
    # The next step's maps and packed parameters are those of the new values, the latter bit for bit.
    u, layers = step._update, len(flow.mlp_weights)
    values = [t.value for t in trained]
    linear, (log_scale, bias) = flow._map_tensors()
    plu = Plu(
        **{k: v if k == "permutation" else v.double() for k, v in linear.items()},
        log_scale=log_scale.double(),
        bias=bias.double(),
    )
    matrix, _, offset, logabsdet = reference.plu_assemble(*plu, need_inverse=False)
    assert max(error(a, b.detach()) for a, b in zip(u.maps, (matrix, offset, logabsdet), strict=True)) < 1e-6
    packed, transposed = (torch.empty_like(t) for t in (u.packed, u.transposed))
    small.pack(step._shape, *u.maps, values[-2 * layers : -layers], values[-layers:], packed, transposed)
    for a, b in ((packed, u.packed), (transposed, u.transposed)):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize(("precisions", "tolerance"), [((TF32, TF32), 2e-2), ((FLOAT32, BF16), 5e-2)])
def test_other_precisions(precisions: tuple[int, int], tolerance: float) -> None:
    flow = made("small")
    rows = rows_of(flow, weighted=False)
    losses, exact = exactly(flow, rows, ORDER, RATES, math.inf)
    step, trained, progress = step_of(flow, rows, ORDER, RATES, math.inf, precisions)
    step.prepare()
    for _ in range(STEPS):
        step.run()
    assert progress.losses.tolist() == pytest.approx(losses, rel=tolerance)
    assert (
        worst([t._replace(mean=t.value, square=t.value) for t in trained], [(v, v, v) for v, *_ in exact]) < tolerance
    )


def test_without_actnorms_and_one_step_at_a_time() -> None:
    flow = made_without = CouplingFlow(6, 2, (16, 8), actnorm=False)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    rows = rows_of(flow, weighted=False)
    losses, exact = exactly(made_without, rows, ORDER, [RATE] * STEPS, 1e6)
    order = ORDER[:1].clone()
    step, trained, progress = step_of(flow, rows, order, [RATE], 1e6, (FLOAT32, FLOAT32), several=False)
    found = []
    for index in ORDER:
        order[0] = index
        step.prepare()
        step.run()
        found.append(progress.losses.item())
    assert found == pytest.approx(losses, rel=1e-5) and worst(trained, exact) < 2e-5


def test_steps_repeat_bit_for_bit() -> None:
    results = []
    for _ in range(2):
        flow = made("deep")
        step, trained, progress = step_of(flow, rows_of(flow, True), ORDER, RATES, 0.3, (FLOAT32, FLOAT32))
        step.prepare()
        for _ in range(STEPS):
            step.run()
        results.append([*progress, *(t for one in trained for t in one)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("what", ["loss", "gradient", "row"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_repeated(what: str) -> None:
    flow, order = made("context"), ORDER.clone()
    rows = rows_of(flow, weighted=True)
    alone = next(r for r in range(ROWS) if r in order[2] and r not in order[:2])
    assert rows.weights is not None
    if what == "row":
        order[2, 4] = ROWS
    else:  # a loss of 1e30 is finite, unlike the square of its gradient
        rows.weights[alone] = math.inf if what == "loss" else 1e30
    step, trained, progress = step_of(flow, rows, order, RATES, 0.3, (FLOAT32, FLOAT32))
    step.prepare()
    for _ in range(2):
        step.run()
    held = [*(t for one in trained for t in one), *step._update.maps, *step._update[-2:], progress.made]
    before = [t.clone() for t in held]
    for _ in range(2):
        step.run()
        assert all(a.view(torch.int32).equal(b.view(torch.int32)) for a, b in zip(held, before, strict=True))
    assert int(progress.made) == 2 and bool(progress.losses[2].isfinite()) == (what == "gradient")


@pytest.fixture
def chosen_here(monkeypatch) -> None:
    """These kernels are chosen on a processor, too."""
    monkeypatch.setattr(training_step, "kernels_for", lambda x, call, *kernels: kernels[0])
    monkeypatch.setattr(training_step.row_products, "ready", lambda x: True)


@pytest.mark.filterwarnings(
    "ignore:glf_fast. steps go through Python:RuntimeWarning"
)  # there is no graph on a processor
@pytest.mark.parametrize("several", [STEPS, 1])
def test_the_steps_of_fit_are_these(several: int, chosen_here, launches) -> None:
    flow = made("context")
    want, rows = copy.deepcopy(flow), fitting_rows.Rows(*rows_of(flow, weighted=True))
    optimizers = [adamw(f, RATE, DECAY) for f in (flow, want)]
    ordinary = Steps(want, optimizers[1], rows, 0.3)
    losses = [ordinary.run(ORDER[k:], RATES[k:])[0][0] for k in range(STEPS)]
    captured = CapturedStep(DeviceStep(flow, optimizers[0], rows, 0.3, several, ORDER.shape[1]))
    captured.step.rates = captured.step.rates.float()  # as they are on a GPU
    found = []
    for k, index in enumerate(ORDER):
        captured.step.order[k % several] = index
        captured.step.rates[k % several] = RATES[k]
        if k == 2:  # between two calls of fit, and at any time between two single steps
            for f in (flow, want):
                for p in f.parameters():
                    p.data.mul_(1)
            captured.prepare()
        captured.run()
        found.append(captured.step.losses[k % several].item())
    assert launches.count("flow_update_kernel") == STEPS - 1  # the first step makes the optimizer's state
    assert found == pytest.approx(losses, rel=1e-4)
    for (name, p), q in zip(flow.named_parameters(), want.parameters(), strict=True):
        assert error(p.detach(), q.detach().double()) < 1e-3, name
    assert {float(state["step"]) for state in optimizers[0].state.values()} == {STEPS}


def frozen() -> CouplingFlow:
    flow = made("context")
    flow.mlp_biases[0].requires_grad_(False)
    return flow


def held() -> CouplingFlow:
    flow = made("context")
    flow.hold("mlp_weights.0", torch.rand_like(flow.mlp_weights[0]) < 0.5)
    return flow


@pytest.mark.parametrize(
    ("make", "kind", "options", "taken"),
    [
        (lambda: made("context"), torch.optim.AdamW, {}, True),
        (lambda: made("context"), torch.optim.Adam, {}, True),
        (lambda: made("context"), torch.optim.Adam, {"weight_decay": 0.1}, False),
        (lambda: made("context"), torch.optim.AdamW, {"amsgrad": True}, False),
        (lambda: made("context"), torch.optim.AdamW, {"maximize": True}, False),
        (lambda: made("context", coupling="separate"), torch.optim.AdamW, {}, False),
        (lambda: made("context", linear="dense"), torch.optim.AdamW, {}, False),
        (lambda: made("context").double(), torch.optim.AdamW, {}, False),
        (frozen, torch.optim.AdamW, {}, False),
        (held, torch.optim.AdamW, {}, False),
    ],
)
def test_other_trainings_are_left_to_others(make, kind, options, taken: bool, chosen_here) -> None:
    flow = make()
    rows = fitting_rows.Rows(*(None if t is None else t.to(flow.mlp_weights[0].dtype) for t in rows_of(flow, True)))
    optimizer = kind(flow.parameters(), RATE, fused=True, **options)
    step = DeviceStep(flow, optimizer, rows, 0.3, 2, 37)
    step.order[0] = ORDER[0]
    step.run()
    progress = Progress(step.order, step.rates, step.losses, step.made)
    assert (small_step(flow, optimizer, rows, 0.3, progress) is not None) == taken


def test_nvrtc_compiles_the_kernels() -> None:
    check_that_nvrtc_compiles(cupy_flow.UPDATE_SOURCE, cupy_flow.UPDATE_KERNELS)
